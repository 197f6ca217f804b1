"""Lumos-1: autoregressive generation of discrete video codes."""
