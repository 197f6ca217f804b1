"""Benchmark of three forms of the training loss: forward, and backward to the hidden states and the head.

    chunked  `chunked_cross_entropy`, as in the decoder: only the visual rows of the head, and only the
             logits of one chunk at a time
    visual   logits [L, visual codes] of all positions, then torch's cross-entropy
    full     logits [L, V] over the whole vocabulary, cut to the visual columns, then torch's
             cross-entropy, as in the published release (arXiv 2507.08801, its training code)

All forms give the same losses and gradients. The extra memory contains the gradients of the hidden states
and of the whole head, which every form needs; a second ratio leaves them out. All positions are
supervised. This is the worst case of the chunked form: in training only masked positions are supervised,
and this form skips the others.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lumos.benchmarks.isolated import run_isolated
from lumos.benchmarks.measure import MB, Bench, Report, Step, extra_peak_bytes, interleaved, ratio, rounded, shown
from lumos.errors import UserError
from lumos.models.lumos1.loss import chunked_cross_entropy
from lumos.runtime import check_memory

FORMS = ("chunked", "visual", "full")
WARM_UP = {"positions": 8, "hidden_size": 16, "vocab_size": 64, "visual_codes": 32}


@dataclass(frozen=True)
class LossBenchmarkSettings:
    """The settings of the loss benchmark.

    positions     numbers L of supervised positions to measure
    hidden_size   channels C of the hidden states
    vocab_size    rows V of the head
    visual_codes  rows of the head for visual codes, which are the last rows
    chunk_size    positions of a chunk
    """

    positions: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    visual_codes: int
    chunk_size: int


def settings_from(args: argparse.Namespace) -> LossBenchmarkSettings:
    for name in ("hidden_size", "vocab_size", "visual_codes", "chunk_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is not allowed; give at least 1")
    if min(args.positions) < 1:
        raise UserError(f"--positions {min(args.positions)} is not allowed; give at least 1")
    if args.visual_codes > args.vocab_size:
        raise UserError(f"--visual-codes {args.visual_codes} do not fit into --vocab-size {args.vocab_size}")
    rows = args.vocab_size + max(args.positions)
    check_memory(4 * rows * args.hidden_size, f"a head of {args.vocab_size:,} rows and {args.hidden_size:,} channels")
    return LossBenchmarkSettings(tuple(args.positions), args.hidden_size, args.vocab_size, args.visual_codes, args.chunk_size)


def steps(settings: LossBenchmarkSettings, bench: Bench) -> int:
    return len(settings.positions) * len(FORMS) * (1 + bench.repetitions)


def prepare(
    form: str, positions: int, hidden_size: int, vocab_size: int, visual_codes: int, chunk_size: int, device: str, dtype: str
) -> Step:
    """Make hidden states [L, C], head [V, C] and targets [L], and return a step.

    The step returns the losses [L] and the gradients of hidden states and head.
    """
    generator = torch.Generator().manual_seed(0)
    place = (device, getattr(torch, dtype))
    hidden = torch.randn(positions, hidden_size, generator=generator).to(*place).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size, generator=generator) * 0.02).to(*place).requires_grad_()
    targets = torch.randint(visual_codes, (positions,), generator=generator).to(device)
    first = vocab_size - visual_codes

    def losses():
        if form == "chunked":
            return chunked_cross_entropy(hidden, weight, targets, first_row=first, rows=visual_codes, chunk=chunk_size)
        if form == "visual":
            return F.cross_entropy(F.linear(hidden, weight[first:]).float(), targets, reduction="none")
        return F.cross_entropy(F.linear(hidden, weight).float()[:, first:], targets, reduction="none")

    def step() -> tuple:
        loss = losses()
        return (loss.detach(), *torch.autograd.grad(loss.mean(), (hidden, weight)))

    return step


def extra_memory(**arguments: Any) -> int:
    """Return the peak memory in bytes without hidden states, head, targets and libraries. Call it in a new process."""
    return extra_peak_bytes(prepare, arguments, WARM_UP)


def run(settings: LossBenchmarkSettings, bench: Bench) -> Report:
    sizes = {name: value for name, value in asdict(settings).items() if name != "positions"}
    measured, ratios = [], []
    table = [["positions", "form", "seconds", "time x", "extra MB", "memory x", "beyond gradients MB", "memory x"]]
    for positions in settings.positions:
        arguments = {"positions": positions, **sizes, **bench.place}
        what = f"loss at {positions} positions"
        memory = {}
        for form in FORMS:
            call = {"form": form, **arguments}
            memory[form] = run_isolated(__name__, "extra_memory", call, threads=bench.threads, what=f"{form} {what}")
            bench.step()
        seconds, difference = interleaved({form: prepare(form, **arguments) for form in FORMS}, bench, what)
        itemsize = getattr(torch, bench.dtype).itemsize
        gradients = (settings.vocab_size + positions) * settings.hidden_size * itemsize
        beyond = {form: memory[form] - gradients for form in FORMS}
        flops = 8 * positions * settings.hidden_size * settings.visual_codes  # forward, recomputed logits, two gradients
        share = flops / seconds["chunked"] / 1e9 / bench.peak_gflops[bench.dtype]
        measured.append({
            "positions": positions, "gradients_mb": rounded(gradients / MB),
            **{form: {"seconds": rounded(seconds[form]), "extra_memory_mb": rounded(memory[form] / MB)} for form in FORMS},
            "max_difference": rounded(difference), "chunked_share_of_peak": rounded(share),
        })  # fmt: skip
        of: dict[str, Any] = {"positions": positions}
        for form in FORMS:
            times, bytes_, more = (ratio(figure[form], figure["chunked"]) for figure in (seconds, memory, beyond))
            if form != "chunked":
                name = f"{form}_over_chunked"
                of |= {f"{name}_time": times, f"{name}_memory": bytes_, f"{name}_memory_beyond_gradients": more}
            table.append([
                f"{positions:,}", form, shown(seconds[form]), shown(times), shown(memory[form] / MB), shown(bytes_),
                shown(beyond[form] / MB), shown(more),
            ])  # fmt: skip
        ratios.append(of)
    return Report(asdict(settings), measured, ratios, [table])
