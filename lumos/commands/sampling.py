"""The flags of the settings that save time or memory, the same for every verb that draws clips."""

from __future__ import annotations

import argparse

TRADES = ("guidance_interval", "confidence_threshold", "later_steps", "history_frames")
"""Fields of GenerationSettings."""


def add_trades(parser: argparse.ArgumentParser, pictures: bool = False) -> None:
    """pictures: without those that only clips know."""
    add = parser.add_argument
    add("--guidance-interval", type=float, nargs=2, metavar=("START", "STOP"),
        help="guidance only in this part of each frame's steps: 0 0.5 is the first half")  # fmt: skip
    add("--confidence-threshold", type=float, help="a step also decides every code that is at least so probable")
    if not pictures:
        add("--later-steps", type=int, help="steps of each latent frame after the first")
        add("--history-frames", type=int, help="a frame sees the first latent frame and so many before it; memory stays bounded")
