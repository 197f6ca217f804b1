"""The forms of the training bench recompute different parts, and all give the same loss and gradients."""

from __future__ import annotations

import pytest
import torch

import lumos.models.lumos1.benchmarks.train as bench
from lumos.models.lumos1.attention import KERNELS
from lumos.models.lumos1.modeling import DecoderLayer

SIZES = {
    "tokens": 200, "frame_height": 64, "frame_width": 64, "channels": 64, "layers": 2, "text_ids": 9100, "codes": 200,
    "mask_ratio": 0.8,
}  # fmt: skip


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the kernels of attention that run."""

    def __init__(self):
        super().__init__()
        self.attention = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.attention += op.name() in KERNELS
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("form", "layers", "kernels"),
    [
        ("lumos", 4, 8),  # both layers run again, their attention does not: four segments a layer at this size
        ("lumos_without_checkpointing", 2, 8),
        ("published", 4, 4),  # everything runs again
        ("published_without_checkpointing", 2, 2),
    ],
)
def test_a_form_recomputes_what_it_says(form, layers, kernels, monkeypatch):
    """Count the calls of layers and of attention kernels in a whole step."""
    ran, forward = [], DecoderLayer.forward
    monkeypatch.setattr(DecoderLayer, "forward", lambda self, *args: ran.append(1) or forward(self, *args))
    step = bench.prepare(form, "cpu", "float32", **SIZES)
    with Operators() as counted:
        step()
    assert (len(ran), counted.attention) == (layers, kernels)


def test_all_forms_have_the_same_loss_and_gradients():
    forms = [form for form in bench.FORMS if form != "llama"]
    assert len(forms) == 4
    first, *others = (bench.prepare(form, "cpu", "float32", **SIZES)() for form in forms)
    for other in others:
        assert len(first) == len(other)
        for ours, theirs in zip(first, other, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
