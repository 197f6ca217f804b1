"""The flags that save time or memory, the same for every verb that draws clips."""

from __future__ import annotations

import argparse

TRADES = ("guidance_interval", "confidence_threshold", "later_steps", "history_frames")
"""Fields of GenerationSettings."""
ACCELERATION = ("int8", "compile")
"""Arguments of LumosPipeline.from_pretrained."""


def add_trades(parser: argparse.ArgumentParser, pictures: bool = False) -> None:
    """pictures: without those that only clips know."""
    add = parser.add_argument
    add("--guidance-interval", type=float, nargs=2, metavar=("START", "STOP"),
        help="guidance only in this part of each frame's steps: 0 0.5 is the first half")  # fmt: skip
    add("--confidence-threshold", type=float, help="a step also decides every code that is at least so probable")
    if not pictures:
        add("--later-steps", type=int, help="steps of each latent frame after the first")
        add("--history-frames", type=int, help="a frame sees the first latent frame and so many before it; memory stays bounded")


def add_acceleration(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--int8", action="store_true", help="the decoder's linear layers with int8 weights: a quarter of the memory (extra [int8])")
    add("--compile", action="store_true", help="torch.compile for norms and MLPs; the first clip waits for the compiler")
