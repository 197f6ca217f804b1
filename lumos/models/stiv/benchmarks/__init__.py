"""Benchmark of the transformer of STIV: a sampling step and a training step."""
