"""Benchmark of compression: scores against plain forward passes, and steps of distillation against training steps.

Scoring   Scores of L layers need L + 1 forward passes; those that skip a layer do not run the layers before it again. The time
          is compared with L + 1 whole passes.
Steps     Forward, backward and AdamW of the student, alone and with each loss of its teacher; the critic's own step counts.
Memory    The peak of a step beyond weights, moments and inputs, each in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lumos.benchmarks.isolated import run_isolated
from lumos.benchmarks.measure import MB, Bench, Report, Step, extra_peak_bytes, interleaved, ratio, rounded, shown
from lumos.compression import importance
from lumos.compression.distillation import make_task
from lumos.compression.networks import GeneratorNetwork
from lumos.compression.plans import Plan, check_keep, removed_by
from lumos.compression.pruning import prune
from lumos.compression.settings import build_settings
from lumos.data.curriculum import StepShape
from lumos.errors import UserError
from lumos.pipeline.defaults import shipped_model
from lumos.runtime import no_progress_bar, return_freed_memory
from lumos.training.auxiliary import without_gradient
from lumos.training.engine import pick_precision

FORMS = {
    "training": {"task": 1.0, "kd": 0.0, "icd": 0.0, "mca": 0.0},
    "kd": {"icd": 0.0, "mca": 0.0},
    "icd": {"kd": 0.0, "mca": 0.0},
    "kd + icd": {"mca": 0.0},
    "difference": {"kd": 0.0, "icd": 0.0, "motion": "difference"},
    "mca": {"kd": 0.0, "icd": 0.0},
    "all": {},
    "kd + icd, teacher bf16": {"mca": 0.0, "teacher_precision": "bf16"},
    "all, teacher bf16": {"teacher_precision": "bf16"},
}
"""The forms of a step, by name, with their settings of the section distill; the first is the student's training step."""
MEASURES = ("loss", "bi", "output")
WHOLE, SCORES = "L + 1 forwards", "scores"
STEP = 1  # of the run: icd has not fallen to 0


@dataclass(frozen=True)
class CompressionBenchmarkSettings:
    """The settings of the benchmark of compression.

    teacher  model folder
    keep     layers of the student
    clips    clips in a forward pass and in a training step
    parts    some of "scoring", "steps" and "memory"
    """

    teacher: str
    keep: int
    clips: int
    parts: tuple[str, ...]


def settings_from(args: argparse.Namespace) -> CompressionBenchmarkSettings:
    teacher = args.teacher or str(shipped_model())
    units = list(GeneratorNetwork(teacher).on_meta().units())
    keep = max(2, round(0.75 * len(units))) if args.keep is None else args.keep
    check_keep(units, keep, 2, ends=False)
    if not 1 <= args.clips <= 4096:
        raise UserError(f"--clips {args.clips} is not allowed; give 1 to 4096")
    return CompressionBenchmarkSettings(teacher, keep, args.clips, tuple(dict.fromkeys(args.of_compression)))


def steps(settings: CompressionBenchmarkSettings, bench: Bench) -> int:
    of_parts = {"scoring": 2 * bench.repetitions, "steps": len(FORMS) * bench.repetitions, "memory": len(FORMS) + 1}
    return sum(of_parts[part] for part in settings.parts)


def run(settings: CompressionBenchmarkSettings, bench: Bench) -> Report:
    measured: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    tables = []
    if "scoring" in settings.parts:
        measured["scoring"], ratios["scoring"], table = run_scoring(settings, bench)
        tables.append(table)
    if {"steps", "memory"} & set(settings.parts):
        with student_of(settings) as student:
            seconds = times_of_steps(settings, student, bench) if "steps" in settings.parts else {}
            memory = memory_of(settings, student, bench) if "memory" in settings.parts else {}
        plain, plain_memory = seconds.get("training"), memory.get("training")
        measured["steps"] = {
            form: {"seconds": rounded(seconds.get(form)), "extra_memory_mb": rounded(memory[form] / MB) if memory else None}
            for form in (*FORMS, SCORES)
            if form in seconds or form in memory
        }
        ratios["steps"] = {f"{form}_over_training_time": ratio(spent, plain) for form, spent in seconds.items()}
        ratios["steps"] |= {f"{form}_over_training_memory": ratio(held, plain_memory) for form, held in memory.items()}
        table = [["step", "seconds", "time x", "extra MB", "memory x"]]
        for form in measured["steps"]:
            spent, held = seconds.get(form), memory.get(form)
            table.append([form, shown(spent), shown(spent and spent / plain), shown(held and held / MB),
                          shown(held and held / max(1, plain_memory))])  # fmt: skip
        tables.append(table)
    return Report(asdict(settings), measured, ratios, tables)


@contextmanager
def student_of(settings: CompressionBenchmarkSettings) -> Iterator[str]:
    """Give the folder of a student with evenly spaced layers of the teacher, within the block."""
    network = GeneratorNetwork(settings.teacher)
    removed = removed_by("spaced", list(network.on_meta().units()), settings.keep)
    plan = Plan("spaced", network.part, next(iter(network.on_meta().unit_kinds)), tuple(removed), sha256=network.sha256)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "student"
        prune(network, plan, folder)
        yield str(folder)


def task_of(folder: str, teacher: str, clips: int, device: str, dtype: str, distill: dict[str, Any]) -> Any:
    """Return the training task of a model folder, inside a DistillationTask, for clips of synthetic scenes."""
    network = GeneratorNetwork(teacher)
    clip, config = network.clip, network.config
    shape = {"height": clip.height, "width": clip.width, "num_frames": clip.num_frames, "fps": clip.fps}
    needed = any(distill.get(name, 1.0) for name in ("kd", "icd", "mca"))
    critic = {"critic_warmup": 0} if distill.get("mca", 1.0) and distill.get("motion") != "difference" else {}
    settings = build_settings({
        "generator": network.generator.name, "model": {"from": folder},
        "distill": {**distill, **critic, **({"teacher": teacher} if needed else {})},
        "data": {**shape, "validation_clips": clips, "workers": 0,
                 **({"stages": [{"image_share": 1.0}]} if clip.num_frames == 1 else {})},
        "training": {"device": device, "batch_size": clips, "precision": {"float32": "fp32", "bfloat16": "bf16"}.get(dtype, dtype)},
        **network.generator.load("task").score_settings(config),
    })  # fmt: skip
    return make_task(settings, torch.device(device))


# ---- scoring


def prepare_scoring(teacher: str, clips: int, device: str, dtype: str) -> Step:
    """Return a step that scores the layers of a model. The memory benchmark calls it."""
    return scoring_steps(teacher, clips, device, dtype)[SCORES]


def scoring_steps(teacher: str, clips: int, device: str, dtype: str) -> dict[str, Step]:
    """Return the two forms of scoring."""
    network = GeneratorNetwork(teacher)
    with no_progress_bar():
        model = network.load(getattr(torch, dtype)).to(device)
    task = task_of(teacher, teacher, clips, device, dtype, FORMS["training"]).inner
    kind = "image" if network.clip.num_frames == 1 else "video"
    micro = task.batch(STEP, StepShape(kind, clips), range(clips), dropout=False).whole
    units = model.units()

    def forwards() -> tuple:
        with torch.no_grad():
            for _ in range(len(units) + 1):
                task.forward(model, micro)
        return ()

    def scores() -> tuple:
        importance.score(task, model, [micro], units, MEASURES)
        return ()

    return {WHOLE: forwards, SCORES: scores}


def run_scoring(settings: CompressionBenchmarkSettings, bench: Bench) -> tuple[dict[str, Any], dict[str, Any], list[list[str]]]:
    """Measure scoring and return (figures, ratios, table)."""
    return_freed_memory(torch.device(bench.device))
    forms = scoring_steps(settings.teacher, settings.clips, **bench.place)
    seconds, _ = interleaved(forms, bench, "scoring", choose=min)
    layers = len(GeneratorNetwork(settings.teacher).on_meta().units())
    measured = {
        "layers": layers, "measures": list(MEASURES), "seconds": rounded(seconds[SCORES]),
        "seconds_per_layer": rounded(seconds[SCORES] / layers), "seconds_of_forwards": rounded(seconds[WHOLE]),
    }  # fmt: skip
    ratios = {"scores_over_forwards_time": ratio(seconds[SCORES], seconds[WHOLE])}
    table = [["scoring", "seconds", "per layer", "time x"]]
    table += [[form, shown(spent), shown(spent / layers), shown(spent / seconds[WHOLE])] for form, spent in seconds.items()]
    return measured, ratios, table


# ---- steps of distillation


def prepare_step(form: str, student: str, teacher: str, clips: int, device: str, dtype: str) -> Step:
    """Make the networks and return the step of one form. The memory benchmark calls it."""
    outer = task_of(student, teacher, clips, device, dtype, FORMS[form])
    kind = "image" if GeneratorNetwork(teacher).clip.num_frames == 1 else "video"
    micro = outer.batch(STEP, StepShape(kind, clips), range(clips)).whole
    precision = pick_precision(outer.inner.settings.training.precision, torch.device(device))
    networks = [(outer.build_model().to(device).train(), outer.losses)]
    if (critic := outer.build_auxiliary()) is not None:
        networks.append((critic.to(device), partial(outer.auxiliary_losses, networks[0][0])))
    optimizers = [torch.optim.AdamW(network.parameters(), lr=0.0, fused=True) for network, _ in networks]

    def step() -> tuple:
        of_step = dict(micro)
        for i, ((network, losses_of), optimizer) in enumerate(zip(networks, optimizers, strict=True)):
            others = [other for j, (other, _) in enumerate(networks) if j != i]
            with without_gradient(nn.ModuleList(others)):
                with torch.autocast(device, precision, enabled=precision != torch.float32):
                    found = losses_of(network, of_step)
                (found[0] if isinstance(found, tuple) else found).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        outer.step_values()
        return ()

    step()  # moments
    return step


def times_of_steps(settings: CompressionBenchmarkSettings, student: str, bench: Bench) -> dict[str, float]:
    """Return the fastest seconds of a step of each form."""
    return_freed_memory(torch.device(bench.device))
    forms = {form: prepare_step(form, student, settings.teacher, settings.clips, **bench.place) for form in FORMS}
    return interleaved(forms, bench, "a step of distillation", choose=min)[0]


def extra_memory(of: str, **arguments: Any) -> int:
    """Return the peak memory in bytes of a step of distillation or of scoring, without weights and inputs.

    of: "prepare_step" or "prepare_scoring". Call it in a new process.
    """
    return_freed_memory(torch.device(arguments["device"]))
    return extra_peak_bytes({"prepare_step": prepare_step, "prepare_scoring": prepare_scoring}[of], arguments, {"clips": 1})


def memory_of(settings: CompressionBenchmarkSettings, student: str, bench: Bench) -> dict[str, int]:
    """Return the peak memory of each form in bytes, each in its own process."""
    common = {"teacher": settings.teacher, "clips": settings.clips, **bench.place}
    calls = {form: {"of": "prepare_step", "form": form, "student": student, **common} for form in FORMS}
    calls[SCORES] = {"of": "prepare_scoring", **common}
    found = {}
    for name, call in calls.items():
        found[name] = run_isolated(__name__, "extra_memory", call, threads=bench.threads, what=f"the memory of {name}")
        bench.step()
    return found
