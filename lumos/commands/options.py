"""Flags that several verbs share: how a pipeline is loaded and how clips are sampled."""

from __future__ import annotations

import argparse
from typing import Any

from lumos.pipeline.options import ACCELERATION, add_acceleration, add_flags, all_options, given_options

PLACES = ("video_tokenizer", "text_tokenizer", "lora")
LOADING = (*PLACES, "device", *ACCELERATION, "device_map")
"""Arguments of a pipeline's from_pretrained whose values are those of the flags."""


def add_sampling(parser: argparse.ArgumentParser, pictures: bool = False, given: bool = True) -> None:
    """Add a flag for each sampling option of the generators.

    If `pictures` is set, options that have no effect on a picture are left out. If `given` is set, options
    for clips that begin with given frames are added too.
    """
    add_flags(parser, all_options(), pictures=pictures, given=given)


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling options that the user gave, by name."""
    return given_options(args, all_options())


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the places of the tokenizers."""
    add = parser.add_argument
    add("--video-tokenizer", help="folder of the video tokenizer; default: the one in the model folder")
    add("--text-tokenizer", help="file or folder of the text tokenizer; default: the one in the model folder")


def add_device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on CUDA, float32 on CPU")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add all flags that say how a pipeline is loaded, except --model."""
    add = parser.add_argument
    add("--lora", help="adapter folder that a run with lora.rank exported; it is merged into the model")
    add_parts(parser)
    add_device(parser)
    add_acceleration(parser)
    add("--device-map", choices=("auto",), help="leave layers that do not fit on the device in host memory or in their files")
    add("--max-memory", nargs="+", metavar="PLACE=SIZE",
        help="memory limits for the weights with --device-map, for example 0=6GiB cpu=16GiB")  # fmt: skip
