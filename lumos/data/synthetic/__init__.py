"""Synthetic scenes: clips with known content, drawn from a seed."""
