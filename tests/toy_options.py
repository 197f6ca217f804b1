"""The parts of the toy generator that `--help` loads; they import no torch, so that it stays quick."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from lumos.pipeline.options import SamplingOptions
from lumos.settings import setting


@dataclass(frozen=True)
class ToyOptions(SamplingOptions):
    num_inference_steps: int = setting(2, "Euler steps", low=1, high=1000, step=1, cost=True)
    guidance_scale: float = setting(2.0, "classifier-free guidance; 1 is none", low=1, high=50, step=0.5, cost=True)
    noise_scale: float = setting(1.0, "standard deviation of the noise at the start", above=0, high=4, step=0.25)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--toy-clips", type=int, default=1)
