"""`export`: write a run, one of its checkpoints or an adapter as a folder for `generate.py --model` or `--lora`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lumos.cli import add_json
from lumos.errors import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("source", help="folder of a run (its newest undamaged checkpoint is used), of a checkpoint, or of an adapter to merge")
    add("--out", required=True, help="folder to write; it must not exist yet")
    add("--weights", choices=("averaged", "trained"), help="which weights; default: the averaged ones if the run has them")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="default: the run's training.export_dtype; adapters: float32")
    add("--merge", action="store_true", help="for a run with LoRA, write the whole model instead of the adapter")
    add("--mix", nargs=2, metavar=("MODEL", "SHARE"),
        help="mix in a share (between 0 and 1) of another model's weights, usually the one that the run started from")  # fmt: skip
    add("--model", help="base model to merge into; default: the one that the adapter was trained on")
    add("--video-tokenizer", help="default: the path in the run's settings; with a merge: the base model's folder")
    add("--link-video-tokenizer", action="store_true",
        help="name the video tokenizer's folder in video_tokenizer.json in place of a copy; the folders must then move together")
    add("--text-tokenizer", help="default: the path in the run's settings; with a merge: the base model's folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.errors import UserError
    from lumos.files import check_new
    from lumos.lora import is_adapter
    from lumos.training.export import Mix, Tokenizers, export_adapter, export_checkpoint, export_merged, find_checkpoint

    out = Path(args.out)
    check_new(out)
    if (args.video_tokenizer is None) != (args.text_tokenizer is None):
        raise UserError("--video-tokenizer and --text-tokenizer go together; give both or none")
    tokenizers = Tokenizers(args.video_tokenizer, args.text_tokenizer) if args.video_tokenizer else None
    if args.mix and (args.merge or is_adapter(args.source)):
        raise UserError("--mix takes the run of a whole model; leave it out")
    if args.link_video_tokenizer and (args.merge or is_adapter(args.source)):
        raise UserError("--link-video-tokenizer takes the run of a whole model; leave it out")
    if is_adapter(args.source):
        if args.weights:
            raise UserError("--weights has no effect on an adapter folder, which holds one kind; leave it out")
        base = export_adapter(args.source, args.model, out, dtype=args.dtype or "float32", tokenizers=tokenizers)
        print(printable(f"{out}  {args.source} merged into {base}"))
        return {"out": str(out), "adapter": args.source, "base": base}
    folder, state = find_checkpoint(args.source)
    if not args.merge:
        if args.model:
            raise UserError("--model has an effect only with --merge; leave it out")
    elif not state["task"]["lora"]:
        raise UserError(f"{folder} has no adapters to merge (its lora.rank is not set); leave --merge out")
    averaged = None if args.weights is None else args.weights == "averaged"
    if args.merge:
        made = export_merged(folder, state, args.model, out, averaged=averaged, dtype=args.dtype, tokenizers=tokenizers)
    else:
        mix = Mix.read(*args.mix) if args.mix else None
        made = export_checkpoint(folder, state, out, averaged=averaged, dtype=args.dtype, tokenizers=tokenizers, mix=mix,
                                 link=args.link_video_tokenizer)  # fmt: skip
    what = "model" if args.merge or not state["task"]["lora"] else "adapter"
    weights = "averaged" if made["averaged"] else "trained"
    print(printable(f"{out}  {what} of step {made['steps']}, {weights} weights, {made['dtype']}"))
    return {"out": str(out), "what": what, **{name: made[name] for name in ("steps", "averaged", "dtype")}}
