"""What `python -m lumos bench` measures: the benchmarks of all generators, which the registry names.

A benchmark's module has `settings_from(args)` (a frozen dataclass; UserError for what cannot be measured),
`steps(settings, bench)` (how often `bench.step` is called, for the progress bar) and `run(settings, bench) -> Report`.
"""

from __future__ import annotations

from lumos import registry


def targets() -> dict[str, registry.Benchmark]:
    """The benchmarks by name; of names that two generators have, the later generator's gets its own name before it."""
    found: dict[str, registry.Benchmark] = {}
    for generator in registry.generators().values():
        for name, benchmark in generator.benchmarks.items():
            found[f"{generator.name}-{name}" if name in found else name] = benchmark
    return found
