"""The roofline: the least time that matrix products and attention take at this machine's speed for their shapes.

A multiply-add is two FLOPs. Norms and everything else that is neither a matrix product nor attention count as zero.
Attention counts at its own best speed, that of a fused kernel or of its two products, whichever is faster: a fused
kernel never writes the scores, so it may be faster than the two products.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lumos.device_peak import timed

PRODUCT_SECONDS, PRODUCT_RUNS, SMALLEST_SHARE = 0.3, 3, 1e-3
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear")
ATTENTION = ("scaled_dot_product", "flash", "efficient_attention", "cudnn_attention")
FLASH_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Product:
    """The FLOPs that the part `part` of a network spends in products [batch, m, k] x [batch, k, n]."""

    part: str
    flops: float
    batch: int
    m: int
    k: int
    n: int


@dataclass(frozen=True)
class AttentionProduct(Product):
    """The FLOPs that the part `part` of a network spends in attention: `batch` heads of m queries and n keys of k channels.

    A head has two products: [m, k] x [k, n], queries by keys, and [m, n] x [n, k], weights by values.
    """


class ProductRecorder(TorchDispatchMode):
    """Counts the matrix products that run within it, by operator and shape (batch, m, k, n).

    Attention counts under "attention", with the shape (heads, queries, channels, keys). A convolution counts as the
    product of its patches with its weights.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[tuple[str, int, int, int, int]] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            (*batch, m, k), n = args[-2].shape, args[-1].shape[-1]
            self.counts[name, math.prod(batch), m, k, n] += 1
        elif name.startswith("_scaled_dot_product") and "backward" not in name:
            *heads, queries, k = args[0].shape
            self.counts["attention", math.prod(heads), queries, k, args[1].shape[-2]] += 1
        elif name in ("convolution", "_convolution"):
            weight, places = args[1], out.numel() // out.shape[1]
            self.counts["convolution", 1, places, weight[0].numel(), len(weight)] += 1
        return out


def recorded_products(step: Callable[[], Any]) -> list[Product]:
    """Return the matrix products of one call of `step`: one `Product` for each shape, an `AttentionProduct` for attention."""
    with torch.no_grad(), ProductRecorder() as recorder:
        step()
    found = []
    for (name, batch, m, k, n), count in recorder.counts.items():
        kind, flops = (AttentionProduct, 4.0) if name == "attention" else (Product, 2.0)
        found.append(kind(f"{name} {count} x [{batch} x {m} x {k} x {n}]", flops * count * batch * m * k * n, batch, m, k, n))
    return found


def counted_flops(step: Callable[[], Any], gradients: bool = False) -> int:
    """Return the FLOPs of one call of `step` as torch counts them (`torch.utils.flop_counter`), attention on a CPU included.

    gradients: whether the step has a backward pass, in which attention on a CPU does not count.
    """
    flash = {FLASH_ON_CPU: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v)}
    with torch.set_grad_enabled(gradients), FlopCounterMode(display=False, custom_mapping=flash) as counter:
        step()
    return counter.get_total_flops()


def roofline_seconds(products: Sequence[Product], device: str, dtype: torch.dtype) -> float:
    """Return the time that the products take alone, each at the measured speed of its shape.

    Shapes with less than a thousandth of the FLOPs are left out: measuring their speed takes longer than they are worth.
    """
    total = sum(p.flops for p in products)
    return sum(p.flops / product_gflops(p, device, dtype) / 1e9 for p in products if p.flops >= SMALLEST_SHARE * total)


def product_gflops(product: Product, device: str, dtype: torch.dtype) -> float:
    """Measure the GFLOP/s of a product of this shape: the fastest of several runs into an existing buffer.

    Attention is measured fused and as its two products without a softmax; the faster of both counts.
    """
    batch, m, k, n = product.batch, product.m, product.k, product.n
    flops = 2 * batch * m * k * n
    if isinstance(product, AttentionProduct):
        q, keys, values = (torch.rand(1, batch, length, k, device=device).to(dtype) for length in (m, n, n))
        fused = 2 * flops / fastest(lambda: F.scaled_dot_product_attention(q, keys, values), device) / 1e9
        scores, weighted = Product("scores", flops, batch, m, k, n), Product("values", flops, batch, m, n, k)
        apart = 2 / sum(1 / product_gflops(p, device, dtype) for p in (scores, weighted))
        return max(fused, apart)
    a, b = torch.rand(batch, m, k, device=device).to(dtype), torch.rand(batch, n, k, device=device).to(dtype)
    out = torch.empty(batch, m, n, device=device, dtype=dtype)

    def multiply() -> None:
        if batch == 1:
            torch.mm(a[0], b[0].T, out=out[0])
        else:
            torch.bmm(a, b.mT, out=out)

    return flops / fastest(multiply, device) / 1e9


def fastest(run: Callable[[], Any], device: str) -> float:
    """Return the seconds of the fastest of several runs, after one that is not timed."""
    run()
    times, until = [], time.perf_counter() + PRODUCT_SECONDS
    while time.perf_counter() < until or len(times) < PRODUCT_RUNS:
        times.append(timed(run, device)[0])
    return min(times)


def profiled(step: Callable[[], None], device: str) -> dict[str, float]:
    """Profile one call of `step` and return the share of the wall time of each kind of operation.

    The kinds are "products", "attention", the six costliest other operations, "other operations" for the rest,
    and "no operation". On a CPU, times are those of the calling thread, without nested operations. On CUDA,
    times are those of kernels, so "no operation" is the share of time in which the GPU is idle.
    """
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        seconds, _ = timed(step, device)
    spent: dict[str, float] = {}
    others: dict[str, float] = {}
    for event in profiler.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        name = event.key.removeprefix("aten::").lstrip("_")
        if any(word in name for word in ATTENTION):
            spent["attention"] = spent.get("attention", 0.0) + micros
        elif name in PRODUCTS or "gemm" in name:
            spent["products"] = spent.get("products", 0.0) + micros
        else:
            others[name] = others.get(name, 0.0) + micros
    costliest = sorted(others, key=others.get, reverse=True)
    spent |= {name: others[name] for name in costliest[:6]}
    spent["other operations"] = sum(others[name] for name in costliest[6:])
    shares = {name: micros / 1e6 / seconds for name, micros in spent.items()}
    return {**shares, "no operation": max(0.0, 1 - sum(shares.values()))}
