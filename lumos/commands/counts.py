"""Checks of whole-number options, before a verb loads anything."""

from __future__ import annotations

import argparse

from lumos.errors import UserError, shown

MAX_CLIPS = 1_000_000
MAX_BATCH = 2**17
MAX_SEED = 2**63 - 1


def check_counts(args: argparse.Namespace, **bounds: tuple[int, int]) -> None:
    """Raise UserError unless each of the options lies between its two bounds (inclusive) or is None."""
    for name, (least, most) in bounds.items():
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not least <= number <= most:
                allowed = f"at least {least}" if number < least else f"at most {most:,}"
                raise UserError(f"--{name.replace('_', '-')} {shown(number)} is not allowed; give {allowed}")
