"""Measure the memory of real optimizer steps in a process of their own, see test_planning.py.

stdin: a JSON list of settings; the last line of stdout: the peak of each in bytes, from before the model is made.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from lumos import LumosConfig, LumosForVideoGeneration
from lumos.benchmarks.measure import lowered_peak
from lumos.lora import Lora, add_adapters
from lumos.models.lumos1.sequence import build_sequence, code_mask, num_latent_frames, parse_layout
from lumos.runtime import peak_memory_bytes
from lumos.settings import to_plain
from lumos.training.ema import Ema
from lumos.training.launch import make_engine
from lumos.training.sections import DataSettings
from lumos.training.settings import build_settings

CPU = torch.device("cpu")
TEXT_TOKENS = 16


def batch(config: LumosConfig, data: DataSettings, rows: int, t: int) -> tuple[Tensor, Tensor]:
    """Return (ids, targets), each [rows, L], of random words and codes; four fifths of the codes are targets."""
    grid = (t, data.height // config.spatial_compression, data.width // config.spatial_compression)
    words = list(range(256, 256 + TEXT_TOKENS))
    codes = torch.randint(config.visual_token_count, (rows, *grid))
    ids = torch.stack([build_sequence(words, code, fps=8, duration=2, config=config) for code in codes])
    asked = code_mask(parse_layout(ids, config), ids.shape[1]) & (torch.rand(ids.shape) < 0.8)
    targets = torch.where(asked, ids - config.visual_token_start, -100)
    return ids.masked_fill(asked, config.mask_token_id), targets


def prepare(raw: dict) -> Callable[[int, int], None]:
    """Set up a run as the training loop does, and return a function that does one optimizer step."""
    settings = build_settings(raw)
    training = settings.training
    torch.manual_seed(0)
    config = LumosConfig.preset(settings.model.preset, **settings.model.overrides)
    model = LumosForVideoGeneration(config)
    if settings.lora.rank:
        add_adapters(model, Lora(**to_plain(settings.lora)))
    if training.activation_checkpointing:
        model.gradient_checkpointing_enable()
    engine = make_engine(model.train(), settings, CPU)
    ema = Ema(engine.weights(), training.ema_decay) if training.ema_decay else None

    def step(micro_batches: int, t: int) -> None:
        for i in range(micro_batches):
            ids, targets = batch(config, settings.data, training.micro_batch_size, t)
            with engine.autocast():
                losses = engine.model(input_ids=ids, targets=targets).position_loss
            engine.backward(losses.sum() / (micro_batches * len(losses)), last=i + 1 == micro_batches)
        engine.step(1e-4)
        if ema:
            ema.update(engine.weights(), 1)

    return step


def measured(raw: dict) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = lowered_peak(CPU)
    step = prepare(raw)
    step(1, 1)  # the first step makes the state of the optimizer
    training, data = raw["training"], raw["data"]
    step(training["batch_size"] // training["micro_batch_size"], num_latent_frames(data["num_frames"]))
    return peak_memory_bytes(CPU) - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    # The first run of a case loads libraries and makes the kernels for its shapes: the second one is measured.
    print(json.dumps([[measured(case) for _ in range(2)][1] for case in json.load(sys.stdin)]))
