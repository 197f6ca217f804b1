"""A sampling step with guidance, in three forms.

    lumos   as the pipeline runs it: both branches in one batch, on a CPU a few frames or places at a time
    plain   the same with plain operators, a whole batch at a time; its result must agree
    latte   diffusers' LatteTransformer3DModel of the same width and depth: both branches in one batch, guidance, an Euler step

FLOPs are those that run, as torch counts them. The roofline of a form is the time that its own matrix products and attention
take alone, each at the speed of its shape. Latte is another network with more FLOPs, so its time is also compared at equal FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lumos.benchmarks.measure import Bench, Step, interleaved, ratio, rounded, shown
from lumos.benchmarks.roofline import counted_flops, profiled, recorded_products, roofline_seconds
from lumos.models.stiv.benchmarks.cases import SIZES, StivCase, latte_of, make_case, plain_operators
from lumos.models.stiv.guidance import Guidance, GuidanceBranch, over_branches, sample
from lumos.models.stiv.text_encoder import TextStates
from lumos.runtime import parameter_count

FORMS = ("lumos", "plain", "latte")
TIMES = (0.5, 0.52)
SCALE = 7.5
HEADERS = ["sampling step", "form", "GFLOP", "seconds", "GFLOP/s", "roofline s", "of roofline", "time x", "at equal FLOPs x"]


def lumos_step(case: StivCase) -> Step:
    """Return the step of a case, which returns the guided velocity [B, T, C, h, w]."""

    def velocity(x: Tensor, t: float, branches: Sequence[GuidanceBranch]) -> Tensor:
        text = TextStates(*(over_branches(branches, full, empty) for full, empty in zip(case.full, case.empty, strict=True)))
        return case.model(x, torch.full((len(x),), t, device=x.device), *text).sample

    def step() -> tuple[Tensor]:
        (begin, end), = pairwise(TIMES)
        return ((sample(velocity, case.noise, TIMES, "euler", Guidance(scale=SCALE)) - case.noise) / (end - begin),)

    return step


def plain_step(case: StivCase) -> Step:
    """Return the same step with plain operators, a whole batch at a time."""
    case.model.requires_grad_(False)  # so that nothing is kept for a backward pass

    def step() -> tuple[Tensor]:
        with plain_operators(), torch.inference_mode(False), torch.enable_grad():
            return lumos_step(case)()

    return step


def latte_step(model: nn.Module, case: StivCase) -> Step:
    """Return the step of diffusers' model, for inputs of the same sizes. It returns an empty tuple: its result is another one."""
    latents, text = case.noise.transpose(1, 2), torch.cat([case.full.states, case.empty.states]).to(model.dtype)
    times = torch.full((2 * len(latents),), 1000 * TIMES[0], device=latents.device)

    def step() -> tuple:
        predicted = model(torch.cat([latents, latents]).to(model.dtype), times, text).sample.float()
        full, empty = predicted.chunk(2)
        latents + (TIMES[1] - TIMES[0]) * torch.lerp(empty, full, SCALE)
        return ()

    return step


def run_size(size: str, bench: Bench) -> tuple[dict[str, Any], dict[str, Any], list[list[str]]]:
    """Measure one size and return (figures, ratios, rows of the table)."""
    case = make_case(size, **bench.place)
    latte = latte_of(size, **bench.place)
    steps = dict(zip(FORMS, (lumos_step(case), plain_step(case), latte_step(latte, case)), strict=True))
    work = {form: work_of(steps[form], bench) for form in ("lumos", "latte")}
    work["plain"] = work["lumos"] | {"bound": None}
    bench.step()
    inferred = {form: step if form == "plain" else torch.inference_mode()(step) for form, step in steps.items()}
    seconds, difference = interleaved(inferred, bench, f"a sampling step, size {size}")
    shares = profiled(inferred["lumos"], bench.device)
    bench.step()
    speed = {form: work[form]["flops"] / seconds[form] for form in FORMS}
    frames, rows, columns = case.model.config.grid(*SIZES[size].latents)
    row: dict[str, Any] = {
        "size": size, "layers": SIZES[size].layers, "width": SIZES[size].width, "tokens": frames * rows * columns,
        "parameters": {form: parameter_count(m) for form, m in (("lumos", case.model), ("latte", latte))},
        "max_difference": rounded(difference), "shares_of_time": {name: rounded(share, 3) for name, share in shares.items()},
    }  # fmt: skip
    table = []
    for form in FORMS:
        flops, bound = work[form]["flops"], work[form]["bound"]
        share = None if bound is None else bound / seconds[form]
        row[form] = {
            "seconds": rounded(seconds[form]), "gflops": rounded(flops / 1e9), "gflops_a_second": rounded(speed[form] / 1e9),
            "bound_seconds": rounded(bound), "share_of_bound": rounded(share),
        }  # fmt: skip
        table.append([
            size, form, shown(flops / 1e9), shown(seconds[form]), shown(speed[form] / 1e9), shown(bound),
            "-" if share is None else f"{share:.0%}", shown(seconds[form] / seconds["lumos"]), shown(speed["lumos"] / speed[form]),
        ])  # fmt: skip
    of = {
        "size": size, "latte_over_lumos_time": ratio(seconds["latte"], seconds["lumos"]),
        "latte_over_lumos_time_at_equal_flops": ratio(speed["lumos"], speed["latte"]),
        "plain_over_lumos_time": ratio(seconds["plain"], seconds["lumos"]),
        "share_of_bound": row["lumos"]["share_of_bound"],
    }  # fmt: skip
    return row, of, table


def work_of(step: Step, bench: Bench) -> dict[str, float]:
    """Return the FLOPs of a step, and the roofline of its matrix products and attention in seconds."""
    flops: list[int] = []
    products = recorded_products(lambda: flops.append(counted_flops(step)))  # both in one run
    return {"flops": flops[0], "bound": roofline_seconds(products, bench.device, getattr(torch, bench.dtype))}
