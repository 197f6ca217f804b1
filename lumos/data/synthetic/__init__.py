"""Synthetic scenes: clips with known truth, drawn from a seed."""
