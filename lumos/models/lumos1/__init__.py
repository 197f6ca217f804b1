"""Lumos-1: autoregressive generation of discrete video codes by a Llama-like decoder."""

from __future__ import annotations

from lumos.registry import Benchmark, Evaluation, Generator

_HERE = "lumos.models.lumos1"

GENERATOR = Generator(
    name="lumos1",
    summary="autoregressive over discrete video codes: a Llama-like decoder, frame by frame",
    model_types=("lumos", "chameleon"),
    config=f"{_HERE}.configuration:LumosConfig",
    model=f"{_HERE}.modeling:LumosForVideoGeneration",
    pipeline=f"{_HERE}.pipeline:LumosPipeline",
    task=f"{_HERE}.training:ArdfTask",
    settings=f"{_HERE}.training_settings:LumosTrainingSettings",
    sampling=f"{_HERE}.settings:GenerationSettings",
    distillation=f"{_HERE}.distillation:DistillableLumos",
    cost={"training": f"{_HERE}.training_cost", "clip": f"{_HERE}.clip_cost"},
    benchmarks={
        name: Benchmark(summary, f"{_HERE}.benchmarks.{name}", f"{_HERE}.benchmarks.arguments:{name}")
        for name, summary in (
            ("attention", "segmented against dense frame-causal attention, time and extra memory"),
            ("loss", "chunked visual loss against full logits, time and extra memory of forward and backward"),
            ("train", "a training step against the published method, written plainly, and transformers' Llama, speed and memory"),
            ("generate", "a model from loading to clip; its decoder against the published method, written plainly, and a roofline"),
        )
    },
    evaluations={"loss": Evaluation(f"{_HERE}.masked_loss", f"{_HERE}.evaluation_arguments:loss")},
    verbs={"convert": f"{_HERE}.released:convert", "resize": f"{_HERE}.resizing:resize"},
)
