"""Measurements of models: how well clips follow their prompts, and how well a tokenizer reconstructs clips."""
