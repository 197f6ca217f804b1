"""Flags of the benchmarks of Lumos-1. They have a file of their own so that `--help` does not load torch."""

from __future__ import annotations

import argparse

from lumos.models.lumos1.settings import GenerationSettings
from lumos.pipeline.options import add_acceleration, add_flags

SHIPPED = "shipped"
SHAPES = ("0.5b", "mid", "small")
FORMS = ("lumos", "published")
PLAIN = "published method, written plainly"
"""The name in tables of the form "published", which was written for the benchmark after the release and is not the release."""
PRECISIONS = ("bfloat16", "float16", "int8")


def attention(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[4096, 16384, 32768], help="sequence lengths in tokens; default: %(default)s")
    add("--frame-tokens", type=int, default=1828, help="tokens of a latent frame; default: %(default)s (448 x 256)")
    add("--heads", type=int, default=2, help="attention heads; default: %(default)s")
    add("--head-dim", type=int, default=64, help="channels of a head; default: %(default)s")
    add("--forward-only", action="store_true", help="attention: do not measure forward + backward")


def loss(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--positions", type=int, nargs="+", default=[2048, 4096], help="numbers of supervised positions; default: %(default)s")
    add("--hidden-size", type=int, default=1024, help="channels of the hidden states; default: %(default)s")
    add("--vocab-size", type=int, default=129_536, help="rows of the output head; default: %(default)s")
    add("--visual-codes", type=int, default=64_000, help="rows that are visual codes; default: %(default)s")
    add("--chunk-size", type=int, default=256, help="positions of a chunk; default: %(default)s")


def train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokens", type=int, default=8192, help="tokens of the sequence; default: %(default)s")
    add("--frame-height", type=int, default=256, help="frame height in pixels; default: %(default)s")
    add("--frame-width", type=int, default=448, help="frame width in pixels; default: %(default)s")
    add("--channels", type=int, default=512, help="hidden size, a multiple of 64; default: %(default)s")
    add("--layers", type=int, default=8, help="layers; default: %(default)s")
    add("--text-ids", type=int, default=65_536, help="rows of the vocabulary before the codes; default: %(default)s")
    add("--codes", type=int, default=64_000, help="visual codes; default: %(default)s")
    add("--mask-ratio", type=float, default=0.8, help="share of each frame that is masked; default: %(default)s")


def generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="model folder; default: the shipped model")
    add("--prompt", default="a large red circle moves left on a gray background", help="what the clip shows; default: %(default)s")
    add("--shapes", nargs="+", choices=(SHIPPED, *SHAPES), default=[SHIPPED], metavar="SHAPE",
        help=f"decoders to compare with the {PLAIN}: {SHIPPED} (the model), or {', '.join(SHAPES)} with random weights; "
             "0.5b and mid take minutes; default: shipped")  # fmt: skip
    add_flags(parser, {name: option for name, option in GenerationSettings.declared().items() if option.is_trade})
    add_acceleration(parser)
    add("--options-dtype", choices=("bfloat16", "float16"), help="dtype of the weights of the form with options")
    add("--precisions", nargs="+", choices=PRECISIONS, default=[], metavar="PRECISION",
        help=f"also measure how far the logits differ with weights in {' or '.join(PRECISIONS)}")  # fmt: skip
    add("--memory", nargs="*", choices=FORMS, default=list(FORMS), metavar="FORM",
        help=f"forms whose memory to measure (published is the {PLAIN}); each makes one more clip, with one step a frame; "
             "default: both")  # fmt: skip
