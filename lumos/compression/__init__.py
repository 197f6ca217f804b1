"""Compression: how much each unit of a network matters, which units to remove, and the smaller network (VDMini)."""
