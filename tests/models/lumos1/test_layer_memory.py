"""The bytes that `plan` expects a layer to keep for its backward pass equal those that torch saves."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from measured_steps import batch
from planned_cases import CASES, DEEP, case
from torch import Tensor, nn

from lumos import LumosConfig, LumosForVideoGeneration
from lumos.lora import Lora, add_adapters
from lumos.models.lumos1.training_cost import adapter_bytes, layer_bytes
from lumos.planning.sharding import Sharding
from lumos.settings import to_plain
from lumos.training.settings import build_settings

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
KEPT = {  # name -> settings of a case, dtype of the weights; where the case says bf16, autocast computes in it
    "fp32": (CASES["activations"][0], torch.float32),
    "autocast": (CASES["activations, bf16"][0], torch.float32),
    "bf16": (CASES["activations"][0], torch.bfloat16),
    "adapters": (CASES["adapters"][0], torch.float32),
    "few adapters": (CASES["few adapters"][0], torch.float32),
    "adapters without dropout": (case(DEEP, 2, lora={"rank": 8}), torch.float32),
    "few adapters, autocast": (case(DEEP, 2, lora={"rank": 8, "targets": ["up_proj"]}, precision="bf16"), torch.float32),
}


def kept_by_layer(model: LumosForVideoGeneration, number: int, forward: Callable[[], object]) -> int:
    """Return the bytes that one layer keeps for its backward pass, without weights, copies of them, and rotary tables."""
    layer, kept, others = model.model.layers[number], {}, set()
    weights = {tuple(sorted(p.shape)) for p in layer.parameters() if p.dim() == 2}
    inside = False

    def enter(module: nn.Module, args: tuple) -> None:
        nonlocal inside
        inside = True
        others.update(t.untyped_storage().data_ptr() for t in (*model.parameters(), *args[1]))

    def leave(*_) -> None:
        nonlocal inside
        inside = False

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if inside and storage.data_ptr() not in others and tuple(sorted(x.shape)) not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        graph = forward()
    del graph
    return sum(kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_peft if "adapters" in name else ()) for name in KEPT])
def test_what_a_layer_keeps_is_what_torch_keeps(name: str):
    raw, dtype = KEPT[name]
    settings, half = build_settings(raw), raw["training"].get("precision") == "bf16"
    model = LumosForVideoGeneration(LumosConfig.preset("tiny", **raw["model"]["overrides"])).to(dtype)
    if settings.lora.rank:
        add_adapters(model, Lora(**to_plain(settings.lora)))
    ids, targets = batch(model.config, settings.data, rows=2, t=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        kept = kept_by_layer(model.train(), 1, lambda: model(input_ids=ids, targets=targets).position_loss)
    sharding = Sharding(stage=None if dtype == torch.float32 else 1, half=half or dtype == torch.bfloat16, on_gpu=False)
    planned = layer_bytes(model.config, sharding)
    if settings.lora.rank:
        planned += adapter_bytes(model.config, sharding, settings.lora)
    assert kept / ids.numel() == pytest.approx(planned, rel=0.01)
