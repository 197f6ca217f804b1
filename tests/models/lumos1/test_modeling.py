from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lumos import LumosConfig
from lumos.models.lumos1.modeling import LumosMLP
from lumos.models.lumos1.swiglu import SiluTimes, mlp_piece


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


@pytest.mark.parametrize("wanted", [0, 1])
def test_silu_times_makes_no_gradient_that_nobody_wants(wanted: int):
    arguments = [torch.randn(4, 2, requires_grad=i == wanted) for i in range(2)]
    calls = CountedCalls()
    out = SiluTimes.apply(*arguments)
    with calls:
        out.sum().backward()
    assert arguments[1 - wanted].grad is None
    assert ("silu_backward" in calls.names) == (wanted == 0)
    assert ("silu" in calls.names) == (wanted == 1)


class CountedCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_an_mlp_compiles_to_one_graph_with_the_same_gradients(autocast: bool):
    torch.manual_seed(0)
    mlp = LumosMLP(LumosConfig.preset("tiny", hidden_size=64, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48))
    x, results = torch.randn(2, 5, 64, requires_grad=True), []
    for form in (mlp, torch.compile(mlp, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = form(x)
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *mlp.parameters()])])
    for ours, compiled in zip(*results, strict=True):
        torch.testing.assert_close(ours, compiled, **({"rtol": 0.02, "atol": 0.01} if autocast else {}))


@pytest.mark.parametrize(("tokens", "gradients", "pieces"), [(1024, True, 1), (1025, True, 2), (8195, True, 4), (2500, False, 3)])
def test_an_mlp_in_pieces_is_the_mlp(tokens: int, gradients: bool, pieces: int):
    torch.manual_seed(0)
    config = LumosConfig.preset("tiny", hidden_size=64, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48)
    mlp = LumosMLP(config).double()
    x = torch.randn(1, tokens, 64, dtype=torch.float64, requires_grad=True)
    sizes = []
    watched = mlp.up_proj.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-2]))
    with torch.set_grad_enabled(gradients):
        out = mlp(x)
    watched.remove()
    assert (len(sizes), sum(sizes)) == (pieces, tokens)
    assert max(sizes) <= mlp_piece(tokens, gradients)
    expected = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert out.shape == x.shape
    torch.testing.assert_close(out, expected)
    if gradients:
        wanted = [x, *mlp.parameters()]
        ours, theirs = (torch.autograd.grad(of.square().sum(), wanted) for of in (out, expected))
        torch.testing.assert_close(ours, theirs)
