"""What `python -m lumos bench` can measure: each module here is one target.

A target has `add_arguments(parser)`, `settings_from(args)` (a frozen dataclass; UserError for what cannot be measured),
`steps(settings, bench)` (how often `bench.step` is called, for the progress bar) and `run(settings, bench) -> Report`.
"""

from __future__ import annotations

TARGETS = {
    "attention": "segmented against dense frame-causal attention, time and extra memory",
    "loss": "chunked visual loss against full logits, time and extra memory of forward and backward",
    "train": "a training step against the published way and transformers' Llama, tokens per second and memory",
    "generate": "a model from start to clip; its decoder against a plain twin and the machine's bound",
}
