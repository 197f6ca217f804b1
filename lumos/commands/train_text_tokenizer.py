"""`train-text-tokenizer`: train a sentencepiece tokenizer on a file of captions or on captions of synthetic scenes."""

from __future__ import annotations

import argparse
from typing import Any

from lumos.cli import add_json
from lumos.commands.counts import MAX_SEED, check_counts
from lumos.errors import UserError, printable

MAX_CAPTIONS = 10_000_000
MAX_RESERVED = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("--captions", help="text file with one caption a line; default: captions of synthetic scenes")
    add("--worlds", type=int, help="number of captions of synthetic scenes of all kinds, in all wordings; default: 20,000")
    add("--seed", type=int, help="seed of the synthetic scenes; default: 0")
    add("--vocab-size", type=int, default=1024, help="reserved ids, bytes and pieces; at most the model's visual_token_start")
    add("--reserved", type=int, default=254, help="number of ids after 0 that text never produces, for specials and numbers")
    add("--out", required=True, help="folder to write")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.data.synthetic.sampling import captions as scene_captions
    from lumos.data.synthetic.scene import CAPTIONED_KINDS
    from tokenizer import TextTokenizer
    from tokenizer.text import MAX_VOCABULARY

    if args.captions and (args.worlds is not None or args.seed is not None):
        raise UserError("--worlds and --seed have no effect with --captions; leave them out")
    check_counts(args, worlds=(1, MAX_CAPTIONS), seed=(0, MAX_SEED), reserved=(0, MAX_RESERVED), vocab_size=(1, MAX_VOCABULARY))
    captions = args.captions or scene_captions(args.seed or 0, args.worlds or 20_000, kinds=CAPTIONED_KINDS, wording="varied")
    symbols = [f"<reserved{i:03d}>" for i in range(1, args.reserved + 1)]
    text_tokenizer = TextTokenizer.train(captions, args.vocab_size, reserved_symbols=symbols)
    file = text_tokenizer.save_pretrained(args.out)
    print(printable(f"{file}  {text_tokenizer.vocab_size} ids"))
    return {"file": str(file), "vocab_size": text_tokenizer.vocab_size}
