"""A training step (forward, backward, AdamW) of one batch of clips, in five forms of one model.

    plain       plain operators; all activations are kept for the backward pass
    kept        the operators of Lumos (`lumos.models.stiv.fused`), which keep fewer; no activation checkpointing
    attention   activation checkpointing with saved_outputs: attention
    products    activation checkpointing with saved_outputs: products
    masked      as kept, but the main blocks see half of the places of a frame (mask_ratio 0.5)

The losses and all gradients of the first four must agree. AdamW runs with a learning rate of 0: it does all of its work, but the
weights stay the same. Times are the fastest of the interleaved repetitions. The memory of a form is the peak of one step in a new
process, without the memory in use before it (weights, the two moments of AdamW, inputs). It contains the gradients of all
weights. On a CPU all forms run with `return_freed_memory`, as `train.py` does with activation_checkpointing, so that a form holds
only the memory that its tensors need.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lumos.benchmarks.isolated import run_isolated
from lumos.benchmarks.measure import MB, Bench, Step, extra_peak_bytes, interleaved, ratio, rounded, shown, with_optimizer
from lumos.models.stiv.attention import SAVED
from lumos.models.stiv.benchmarks.cases import SIZES, StivCase, make_case, plain_operators
from lumos.models.stiv.flops import forward_flops
from lumos.models.stiv.flow import flow_loss, frame_losses, interpolated, kept_values, masked_frame_losses, target_velocity
from lumos.models.stiv.modeling import StivForVideoGeneration
from lumos.runtime import return_freed_memory

FORMS = ("plain", "kept", *SAVED, "masked")
COMPARED = FORMS[:-1]
MASK_RATIO = 0.5


def loss_of(case: StivCase, data: Tensor, times: Tensor, keep: Tensor | None) -> Tensor:
    """Return the loss of clips `data` [B, T, C, h, w] at times [B], with the noise of the case; keep: as in the model."""
    model, noisy, target = case.model, interpolated(data, case.noise, times), target_velocity(data, case.noise)
    prediction = model(noisy, times, *case.full, keep=keep).sample
    if keep is None:
        return flow_loss(frame_losses(prediction, target))
    _, rows, columns = model.config.grid(data.shape[1], *data.shape[3:])
    return flow_loss(masked_frame_losses(prediction, target, noisy, kept_values(keep, rows, columns, model.config.patch_size)))


def drawn_inputs(case: StivCase) -> tuple[Tensor, Tensor, Tensor]:
    """Return (data [B, T, C, h, w], times [B], the places int64 [B, k] that a masked step keeps)."""
    draws, (clips, frames, _, *grid) = torch.Generator().manual_seed(1), case.noise.shape
    _, rows, columns = case.model.config.grid(frames, *grid)
    kept = rows * columns - round(rows * columns * MASK_RATIO)
    keep = torch.rand(clips, rows * columns, generator=draws).argsort(1)[:, :kept].sort(1).values
    data, times = torch.randn(case.noise.shape, generator=draws), torch.rand(clips, generator=draws)
    return tuple(x.to(case.noise.device) for x in (data, times, keep))


def use(form: str, model: StivForVideoGeneration) -> None:
    """Turn activation checkpointing of the model on or off, as the form says."""
    model.gradient_checkpointing = False
    if form in SAVED:
        model.gradient_checkpointing_enable({"context_fn": SAVED[form]})


def step_of(form: str, case: StivCase, optimizer: torch.optim.Optimizer) -> Step:
    """Return a training step, which returns the loss and all gradients; an empty tuple for masked, whose values are others."""
    data, times, keep = drawn_inputs(case)

    def step() -> tuple[Tensor, ...]:
        use(form, case.model)
        optimizer.zero_grad(set_to_none=True)
        with plain_operators() if form == "plain" else nullcontext():
            loss = loss_of(case, data, times, keep if form == "masked" else None)
            loss.backward()
        optimizer.step()
        if form == "masked":
            return ()
        return loss.detach(), *(p.grad for p in case.model.parameters() if p.grad is not None)

    return step


def prepare(form: str, size: str, device: str, dtype: str) -> Step:
    """Make the model and return the step of one form. The memory benchmark calls it."""
    case = make_case(size, device, dtype, SIZES[size].clips)
    return step_of(form, case, with_optimizer(case.model, device, dtype)[1])


def extra_memory(**arguments: Any) -> int:
    """Return the peak memory of a step in bytes without weights, moments and inputs. Call it in a new process."""
    return_freed_memory(torch.device(arguments["device"]))
    return extra_peak_bytes(prepare, arguments, {"size": "micro"})


def memory_of(size: str, bench: Bench) -> dict[str, int]:
    """Return the peak memory of a step of each form in bytes, each in its own process."""
    found = {}
    for form in COMPARED:
        call = {"form": form, "size": size, **bench.place}
        found[form] = run_isolated(__name__, "extra_memory", call, threads=bench.threads, what=f"a training step of {form}")
        bench.step()
    return found


def times_of(size: str, bench: Bench) -> tuple[dict[str, float], float]:
    """Return (fastest seconds of each form, largest difference of the losses and gradients)."""
    return_freed_memory(torch.device(bench.device))
    case = make_case(size, **bench.place, clips=SIZES[size].clips)
    _, optimizer = with_optimizer(case.model, **bench.place)
    return interleaved({form: step_of(form, case, optimizer) for form in FORMS}, bench, "a training step", choose=min)


def run_training(size: str, parts: tuple[str, ...], bench: Bench) -> tuple[dict[str, Any], dict[str, Any], list[list[str]]]:
    """Measure memory and time of a training step, as `parts` says, and return (figures, ratios, table)."""
    of = SIZES[size]
    memory: dict[str, Any] = memory_of(size, bench) if "memory" in parts else {}
    seconds, difference = times_of(size, bench) if "training" in parts else ({}, None)
    config = of.config()
    grid = config.grid(*of.latents)
    dropped = {form: MASK_RATIO if form == "masked" else 0.0 for form in FORMS}
    needed = {form: 3 * of.clips * forward_flops(config, *grid, of.text, dropped[form]) for form in FORMS}
    row: dict[str, Any] = {"size": size, "clips": of.clips, "tokens": of.clips * grid[0] * grid[1] * grid[2],
                           "max_difference": rounded(difference)}  # fmt: skip
    table = [["training step", "form", "GFLOP", "seconds", "time x", "of peak", "extra MB", "memory x"]]
    for form in FORMS:
        spent, held = seconds.get(form), memory.get(form)
        share = None if spent is None else needed[form] / spent / 1e9 / bench.peak_gflops[bench.dtype]
        row[form] = {
            "gflops_needed": rounded(needed[form] / 1e9), "seconds": rounded(spent), "share_of_peak": rounded(share),
            "extra_memory_mb": None if held is None else rounded(held / MB),
        }  # fmt: skip
        table.append([
            size, form, shown(needed[form] / 1e9), shown(spent), shown(spent and spent / seconds["plain"]),
            "-" if share is None else f"{share:.0%}", shown(held and held / MB), shown(held and held / max(1, memory["plain"])),
        ])  # fmt: skip
    ratios: dict[str, Any] = {"size": size}
    for figure, name in ((memory, "memory"), (seconds, "time")):
        for form in COMPARED[1:] if figure else ():
            for other in COMPARED[: COMPARED.index(form)][:2]:
                ratios[f"{form}_over_{other}_{name}"] = ratio(figure[form], figure[other])
    if seconds:
        ratios["kept_over_masked_time"] = ratio(seconds["kept"], seconds["masked"])
    return row, ratios, table
