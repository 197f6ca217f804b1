"""`convert`: make one model folder of released Lumos-1 weights, their text tokenizer and the Cosmos video tokenizer."""

from __future__ import annotations

import argparse
from typing import Any

from lumos.cli import add_json
from lumos.errors import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("--lumos", required=True, help="released decoder: a folder with config.json and model*.safetensors")
    add("--cosmos", required=True, help="folder with tokenizer/text_tokenizer.json and Cosmos-Tokenizer-DV4x8x8/")
    add("--out", required=True, help="folder to write; it must not exist yet")
    add("--text-tokenizer", help="path of text_tokenizer.json, if it is not in --cosmos")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="dtype of the weights; default: as stored")
    add("--defaults", choices=("image-256p", "video-256p", "video-384p"), help="default clip shape and guidance of the result; "
        "default: from the name of the folder --lumos (stage-1-image, stage-2-joint, ...), video-384p for other names")  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from lumos import registry

    convert = registry.generator_with("verbs", "convert").load("verbs", "convert")
    made = convert(args.lumos, args.cosmos, args.out, text_tokenizer=args.text_tokenizer, defaults=args.defaults,
                   dtype=args.dtype and getattr(torch, args.dtype))  # fmt: skip
    parameters = f"{made['parameters'] / 1e6:,.1f} M parameters"
    print(printable(f"{args.out}  {parameters}, {made['dtype']}, defaults {made['defaults']}"))
    return {"out": args.out, **{name: made[name] for name in ("parameters", "dtype", "defaults")}}
