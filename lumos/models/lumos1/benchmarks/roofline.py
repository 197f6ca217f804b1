"""The roofline of a case: the least time that its matrix products take at this machine's speed for their shapes.

A multiply-add is two FLOPs. The FLOPs are those that every implementation of the method needs:

- All layers for all tokens in both branches: in each step of a frame, and once more for each frame except
  the last, to write it to the cache.
- Attention of these tokens to the cache and to their own frame.
- The visual rows of the head at positions that are still masked. The last layer must compute only keys and
  values at the other positions.

The head counts once for both branches: guidance is linear, so it can be applied to the hidden states.
Softmax, norms and everything else that is not a matrix product count as zero.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lumos.device_peak import timed
from lumos.models.lumos1.benchmarks.decoding import Case
from lumos.models.lumos1.engine import cache_tokens
from lumos.models.lumos1.masking import unmasking_counts

PRODUCT_SECONDS, PRODUCT_RUNS = 0.3, 3
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear")
ATTENTION = ("scaled_dot_product", "flash", "efficient_attention", "cudnn_attention")


@dataclass(frozen=True)
class Product:
    """The FLOPs that the part `part` of the network spends in products [batch, m, k] x [batch, k, n]."""

    part: str
    flops: float
    batch: int
    m: int
    k: int
    n: int


def products(case: Case) -> list[Product]:
    """Return all matrix products of the case. With a confidence threshold, the FLOPs are upper bounds."""
    config, settings, lengths = case.model.config, case.settings, case.prefix_lengths
    codes, layers = case.grid[0] * case.grid[1], config.num_hidden_layers
    passes: list[tuple[int, int]] = []  # (context, positions whose output is needed) for each pass of one frame in one branch
    head_rows = 0
    for frame in range(case.frames):
        steps = settings.steps_of(frame)
        masked = [codes, *unmasking_counts(codes, steps)[:-1]]
        head_rows += sum(masked)
        for branch, length in enumerate(lengths):
            context = cache_tokens(length, case.span, frame + 1, settings.history_frames)
            passes += [(context, m) for step, m in enumerate(masked) if branch == 0 or settings.guides(step, steps)]
            passes += [(context, 0)] * (frame + 1 < case.frames)  # writes the finished frame to the cache
    tokens, wanted = sum(lengths) + case.span * len(passes), sum(m for _, m in passes)
    found = []
    for name, layer in case.model.model.layers[0].named_modules():
        if isinstance(layer, nn.Linear):
            last = tokens if name.endswith(("k_proj", "v_proj")) else wanted
            flops = 2 * layer.weight.numel() * (tokens * (layers - 1) + last)
            found.append(Product(name, flops, 1, len(lengths) * case.span, layer.in_features, layer.out_features))
    pairs = sum(context * (case.span * (layers - 1) + m) for context, m in passes)
    half, mean = 2 * config.hidden_size * pairs, round(statistics.mean(context for context, _ in passes))
    heads = len(lengths) * config.num_attention_heads
    found.append(Product("attention scores", half, heads, case.span, config.head_dim, mean))
    found.append(Product("attention values", half, heads, case.span, mean, config.head_dim))
    head = 2 * config.hidden_size * config.visual_token_count * head_rows
    found.append(Product("head", head, 1, codes, config.hidden_size, config.visual_token_count))
    return found


def product_gflops(product: Product, device: str, dtype: torch.dtype) -> float:
    """Measure the GFLOP/s of a product of this shape: the fastest of several runs into an existing buffer."""
    batch, m, k, n = product.batch, product.m, product.k, product.n
    a, b = torch.rand(batch, m, k, device=device).to(dtype), torch.rand(batch, n, k, device=device).to(dtype)
    out = torch.empty(batch, m, n, device=device, dtype=dtype)

    def multiply() -> None:
        if batch == 1:
            torch.mm(a[0], b[0].T, out=out[0])
        else:
            torch.bmm(a, b.mT, out=out)

    multiply()
    times, until = [], time.perf_counter() + PRODUCT_SECONDS
    while time.perf_counter() < until or len(times) < PRODUCT_RUNS:
        times.append(timed(multiply, device)[0])
    return 2 * batch * m * k * n / min(times) / 1e9


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
