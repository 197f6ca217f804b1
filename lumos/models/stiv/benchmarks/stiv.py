"""Benchmark of the transformer of STIV: a sampling step with guidance, and a training step.

`sampling` compares with diffusers' transformer and with the roofline, `training` with the same model written plainly. Inputs and
weights are random; text states are an input, as they are computed once for a clip.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import chain
from typing import Any

from lumos.benchmarks.measure import Bench, Report
from lumos.errors import UserError
from lumos.models.stiv.benchmarks import sampling, training
from lumos.models.stiv.benchmarks.cases import SIZES
from lumos.runtime import check_memory, pick_device

PLAIN_TENSORS = 45
"""Tensors [tokens, width] that a block of the plain form keeps."""


@dataclass(frozen=True)
class StivBenchmarkSettings:
    """The settings of the benchmark of STIV.

    sizes   names in `cases.SIZES`; the training step is that of the last one
    parts   "sampling", "memory" and "training", or some of them
    """

    sizes: tuple[str, ...]
    parts: tuple[str, ...]


def settings_from(args: argparse.Namespace) -> StivBenchmarkSettings:
    settings = StivBenchmarkSettings(*(tuple(dict.fromkeys(names)) for names in (args.sizes, args.parts)))
    if "sampling" in settings.parts and find_spec("diffusers") is None:
        raise UserError(
            "bench stiv compares with diffusers, which is not installed; pip install 'lumos-video[diffusers]', or give --parts "
            "memory training"
        )
    if {"memory", "training"} & set(settings.parts) and pick_device(args.device).type == "cpu":
        check_memory(memory_needed(settings.sizes[-1]), f"a plain training step of --sizes {settings.sizes[-1]}")
    return settings


def memory_needed(size: str) -> int:
    """Return a rough estimate of the memory of a plain training step in bytes: weights, moments, gradients, activations."""
    of, config = SIZES[size], SIZES[size].config()
    frames, rows, columns = config.grid(*of.latents)
    return 4 * (4 * config.num_parameters + of.clips * frames * rows * columns * of.width * PLAIN_TENSORS * of.layers)


def steps(settings: StivBenchmarkSettings, bench: Bench) -> int:
    of_parts = {
        "sampling": len(settings.sizes) * (2 + len(sampling.FORMS) * bench.repetitions), "memory": len(training.COMPARED),
        "training": len(training.FORMS) * bench.repetitions,
    }  # fmt: skip
    return sum(of_parts[part] for part in settings.parts)


def run(settings: StivBenchmarkSettings, bench: Bench) -> Report:
    measured: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    tables = []
    if "sampling" in settings.parts:
        found = [sampling.run_size(size, bench) for size in settings.sizes]
        measured["sampling"], ratios["sampling"], rows = (list(part) for part in zip(*found, strict=True))
        tables.append([sampling.HEADERS, *chain(*rows)])
    if {"memory", "training"} & set(settings.parts):
        row, of, table = training.run_training(settings.sizes[-1], settings.parts, bench)
        measured["training"], ratios["training"] = row, of
        tables.append(table)
    return Report(asdict(settings), measured, ratios, tables)
