"""Benchmark of segmented against dense frame-causal attention: the attention of one layer on random q, k, v.

The mode "forward" runs without gradients; "training" runs forward and backward to q, k and v. Both forms
come from `attention_for`, as in the decoder. The mask of the dense form is built once in a forward pass of
the whole decoder, so its time is a separate figure. Its memory is part of the dense figure, because only
this form needs it. A sequence consists of as many whole frames as fit, with text before them.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lumos.benchmarks.isolated import run_isolated
from lumos.benchmarks.measure import MB, Bench, Report, Step, extra_peak_bytes, interleaved, ratio, rounded, shown
from lumos.errors import UserError
from lumos.models.lumos1.attention import allowed_pairs, attention_for
from lumos.models.lumos1.sequence import FRAME_HEADER, Frame, SequenceLayout
from lumos.runtime import check_memory

FORMS = ("segmented", "dense")
DENSE_BYTES_PER_PAIR = 8  # measured on CPU: a peak of 7 for each of L * L pairs, for the mask and torch's fp32 copy of it
WARM_UP = {"length": 80, "frame_tokens": 32}


@dataclass(frozen=True)
class AttentionBenchmarkSettings:
    """The settings of the attention benchmark.

    lengths       sequence lengths in tokens
    frame_tokens  tokens of a latent frame (1,828 at 448 x 256 pixels)
    heads         attention heads
    head_dim      channels of a head
    forward_only  do not measure training
    """

    lengths: tuple[int, ...]
    frame_tokens: int
    heads: int
    head_dim: int
    forward_only: bool


def settings_from(args: argparse.Namespace) -> AttentionBenchmarkSettings:
    smallest = FRAME_HEADER + 3
    if args.frame_tokens < smallest:
        raise UserError(f"--frame-tokens {args.frame_tokens} is not allowed; a frame has at least {smallest} tokens")
    for length in args.lengths:
        if length < args.frame_tokens:
            raise UserError(f"--lengths {length} holds no frame of {args.frame_tokens} tokens; give a smaller --frame-tokens")
        # The mask is built in host memory, whatever the device.
        check_memory(DENSE_BYTES_PER_PAIR * length**2, f"the mask of dense attention at --lengths {length}")
    if args.heads < 1 or args.head_dim < 1:
        raise UserError(f"--heads {args.heads} --head-dim {args.head_dim} is not allowed; give at least 1")
    check_memory(
        3 * 4 * max(args.lengths) * args.heads * args.head_dim, f"--heads {args.heads} --head-dim {args.head_dim} of that length"
    )
    return AttentionBenchmarkSettings(tuple(args.lengths), args.frame_tokens, args.heads, args.head_dim, args.forward_only)


def steps(settings: AttentionBenchmarkSettings, bench: Bench) -> int:
    modes, forms = len(modes_of(settings)), len(FORMS)
    return len(settings.lengths) * (modes * forms * (1 + bench.repetitions) + bench.repetitions)


def modes_of(settings: AttentionBenchmarkSettings) -> tuple[str, ...]:
    return ("forward",) if settings.forward_only else ("forward", "training")


def layout_of(length: int, frame_tokens: int) -> SequenceLayout:
    """Return a layout with as many frames of `frame_tokens` tokens as fit at the end, and text before them."""
    text = length % frame_tokens
    cols = frame_tokens - FRAME_HEADER - 2
    return SequenceLayout(length, tuple(Frame(start, 1, cols) for start in range(text, length, frame_tokens)))


def prepare(
    form: str, mode: str, length: int, frame_tokens: int, heads: int, head_dim: int, device: str, dtype: str, rebuild: bool = True
) -> Step:
    """Make the inputs and return a step, which returns the output [1, H, L, D] and in training the gradients of q, k, v.

    If `rebuild` is set, the step also builds the other inputs of the form (the dense mask). Otherwise they
    are built here, before the step.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, length, head_dim)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)) for _ in range(4))
    layout = layout_of(length, frame_tokens)

    def attention():
        return attention_for(form, [layout], length, torch.device(device))

    ready = None if rebuild else attention()

    @torch.no_grad()
    def forward() -> tuple:
        return ((ready or attention())(0, q, k, v),)

    def training() -> tuple:
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = (ready or attention())(0, *inputs)
        return (out.detach(), *torch.autograd.grad(out, inputs, grad))

    return forward if mode == "forward" else training


def extra_memory(**arguments: Any) -> int:
    """Return the peak memory in bytes without q, k, v, the gradient of the output and the libraries.

    Call it in a new process.
    """
    return extra_peak_bytes(prepare, arguments, WARM_UP)


def run(settings: AttentionBenchmarkSettings, bench: Bench) -> Report:
    measured, ratios = [], []
    table = [["tokens", "mode", "segmented s", "dense s", "time x", "segmented MB", "dense MB", "memory x", "peak share"]]
    for length in settings.lengths:
        layout = layout_of(length, settings.frame_tokens)
        pairs = allowed_pairs(layout)
        row: dict[str, Any] = {
            "length": length, "frames": len(layout.frames), "text_tokens": layout.frames[0].start,
            "allowed_pairs_share": rounded(pairs / length**2),
        }  # fmt: skip
        of: dict[str, Any] = {"length": length}
        for mode in modes_of(settings):
            arguments = {
                "mode": mode, "length": length, "frame_tokens": settings.frame_tokens, "heads": settings.heads,
                "head_dim": settings.head_dim, **bench.place,
            }  # fmt: skip
            what = f"attention {mode} at {length} tokens"
            memory = {}
            for form in FORMS:
                call = {"form": form, **arguments}
                memory[form] = run_isolated(__name__, "extra_memory", call, threads=bench.threads, what=f"{form} {what}")
                bench.step()
            forms = {form: prepare(form, rebuild=False, **arguments) for form in FORMS}
            if mode == "forward":
                forms["mask"] = lambda layout=layout, length=length: build_mask(layout, length, bench.device)
            seconds, difference = interleaved(forms, bench, what)
            if mode == "forward":
                row["dense_mask_seconds"] = rounded(seconds["mask"])
            # two matrix products in the forward pass; four in the backward pass, which also computes the scores again
            flops = 2 * pairs * settings.heads * settings.head_dim * (2 if mode == "forward" else 7)
            share = flops / seconds["segmented"] / 1e9 / bench.peak_gflops[bench.dtype]
            row[mode] = {
                **{form: {"seconds": rounded(seconds[form]), "extra_memory_mb": rounded(memory[form] / MB)} for form in FORMS},
                "max_difference": rounded(difference), "segmented_share_of_peak": rounded(share),
            }  # fmt: skip
            times, bytes_ = (ratio(of_form["dense"], of_form["segmented"]) for of_form in (seconds, memory))
            of[mode] = {"dense_over_segmented_time": times, "dense_over_segmented_memory": bytes_}
            table.append([
                f"{length:,}", mode, shown(seconds["segmented"]), shown(seconds["dense"]), shown(times),
                shown(memory["segmented"] / MB), shown(memory["dense"] / MB), shown(bytes_), f"{share:.0%}",
            ])  # fmt: skip
        measured.append(row)
        ratios.append(of)
    return Report(asdict(settings), measured, ratios, [table])


def build_mask(layout: SequenceLayout, length: int, device: str) -> tuple:
    attention_for("dense", [layout], length, torch.device(device))
    return ()
