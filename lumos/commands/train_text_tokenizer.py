"""`train-text-tokenizer`: sentencepiece from a caption file, or from the captions of the small worlds."""

from __future__ import annotations

import argparse

from lumos.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--captions", help="text file with one caption a line; default: captions of the small worlds")
    add("--worlds", type=int, default=20_000, help="how many captions of the small worlds to use without --captions")
    add("--seed", type=int, default=0, help="of the small worlds")
    add("--vocab-size", type=int, default=1024, help="reserved ids, bytes and pieces; at most the model's visual_token_start")
    add("--reserved", type=int, default=254, help="ids after 0 that text can never produce: specials and numbers")
    add("--out", required=True, help="folder to write")


def run(args: argparse.Namespace) -> None:
    from lumos.data import worlds
    from tokenizer import TextTokenizer

    if args.worlds < 1:
        raise UserError(f"--worlds {args.worlds} is not allowed; give at least 1")
    captions = args.captions or worlds.captions(args.seed, args.worlds)
    symbols = [f"<reserved{i:03d}>" for i in range(1, args.reserved + 1)]
    text_tokenizer = TextTokenizer.train(captions, args.vocab_size, reserved_symbols=symbols)
    file = text_tokenizer.save_pretrained(args.out)
    print(f"{file}  {text_tokenizer.vocab_size} ids")
