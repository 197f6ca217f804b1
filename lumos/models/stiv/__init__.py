"""STIV: flow matching over video latents by a diffusion transformer, from text, pictures and given frames."""

from __future__ import annotations

from lumos.registry import Benchmark, Generator

_HERE = "lumos.models.stiv"

GENERATOR = Generator(
    name="stiv",
    summary="flow matching over latents: a diffusion transformer, whole clips at once, from text and any given frames",
    model_types=("stiv",),
    config=f"{_HERE}.configuration:StivConfig",
    model=f"{_HERE}.modeling:StivForVideoGeneration",
    pipeline=f"{_HERE}.pipeline:StivPipeline",
    task=f"{_HERE}.training:StivTask",
    settings=f"{_HERE}.training_settings:StivTrainingSettings",
    sampling=f"{_HERE}.settings:StivOptions",
    distillation=f"{_HERE}.distillation:DistillableStiv",
    cost={"training": f"{_HERE}.cost", "clip": f"{_HERE}.cost"},
    benchmarks={
        "stiv": Benchmark(
            "a sampling step against diffusers' transformer and the roofline; a training step, its time and memory",
            f"{_HERE}.benchmarks.stiv", f"{_HERE}.benchmarks.arguments:stiv",
        ),
    },
)
