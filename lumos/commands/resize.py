"""`resize`: make a model folder whose model decodes the same codes to clips of another size."""

from __future__ import annotations

import argparse
from typing import Any

from lumos.cli import add_json
from lumos.errors import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("model", help="model folder")
    add("--out", required=True, help="folder to write; it must not exist yet")
    add("--video-tokenizer", help="folder of a tokenizer with the same codes, trained with start_from and train_encoder=false; "
        "default: the tokenizer for half the size, which a tokenizer with spatial_patch_size 2 contains")  # fmt: skip
    add("--link-video-tokenizer", action="store_true",
        help="name the folder of --video-tokenizer in video_tokenizer.json in place of a copy; the folders must then move together")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos import registry
    from lumos.files import check_new

    check_new(args.out)
    resize = registry.generator_of(args.model).load("verbs", "resize")
    clip = resize(args.model, args.out, args.video_tokenizer, args.link_video_tokenizer)
    print(printable(f"{args.out}  draws {clip.width} x {clip.height}"))
    return {"out": args.out, "height": clip.height, "width": clip.width}
