"""Benchmarks of the speed and memory of Lumos-1: attention, loss, a training step, generation."""
