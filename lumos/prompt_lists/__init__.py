"""Prompt lists: reading them, sharing their clips among processes, and resuming after a stop."""
