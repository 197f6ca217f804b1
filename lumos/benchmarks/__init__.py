"""The targets of `python -m lumos bench`: the benchmarks of all generators in the registry, and those that work on any of them.

The module of a benchmark has three functions:

    settings_from(args)     returns a frozen dataclass; raises UserError for settings that cannot be measured
    steps(settings, bench)  returns how often `run` calls `bench.step`, for the progress bar
    run(settings, bench)    measures and returns a `lumos.benchmarks.measure.Report`
"""

from __future__ import annotations

from lumos import registry

SHARED = {
    "compress": registry.Benchmark(
        "scores of layers against whole forward passes; steps of distillation against a training step, time and memory",
        "lumos.compression.benchmark", "lumos.compression.benchmark_arguments:compress",
    ),
}  # fmt: skip
"""Benchmarks that work on models of any generator."""


def targets() -> dict[str, registry.Benchmark]:
    """Return the benchmarks by name.

    If two generators have a benchmark of the same name, the one of the later generator is called
    <generator>-<name>.
    """
    found: dict[str, registry.Benchmark] = {}
    for generator in registry.generators().values():
        for name, benchmark in generator.benchmarks.items():
            found[f"{generator.name}-{name}" if name in found else name] = benchmark
    return found | SHARED
