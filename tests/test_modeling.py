from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lumos.modeling import SiluTimes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_times_is_its_plain_form(dtype: torch.dtype):
    gate, up, grad = (torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3))
    results = []
    for form in (SiluTimes.apply, lambda gate, up: F.silu(gate) * up):
        arguments = [x.clone().requires_grad_() for x in (gate, up)]
        out = form(*arguments)
        out.backward(grad)
        results.append([out.detach(), *(x.grad for x in arguments)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_silu_times_gradient_by_finite_differences():
    gate, up = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(SiluTimes.apply, (gate, up))


def test_silu_times_keeps_two_tensors():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        SiluTimes.apply(torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True))
    assert len(kept) == 2
