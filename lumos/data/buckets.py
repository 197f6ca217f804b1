"""Crop sizes of almost equal area, one for every aspect ratio (the published recipe, so that lengths hardly vary).

``target_size`` S stands for an area of S x S pixels; a size counts whole units (32 pixels as published), because the
size tokens of a sequence do. All sizes are (height, width) in pixels.
"""

from __future__ import annotations

from functools import lru_cache

from lumos.errors import UserError

# The published size table uses 768x480, which the walk below does not reach: added at its own target size.
_ADDED_SIZES = {(656, 32): ((480, 768),)}


@lru_cache
def bucket_sizes(target_size: int, unit: int = 32, max_aspect: float = 4.0) -> tuple[tuple[int, int], ...]:
    """All (height, width) of at most ``target_size ** 2`` pixels that cannot grow in height, widest first.

    A walk along the staircase of rectangles with at most (target_size // unit) ** 2 units: grow the height while the
    area allows it, else give up a column; kept if the long side is at most ``max_aspect`` times the short one.
    """
    if unit < 1 or target_size < unit or max_aspect < 1:
        raise UserError(
            f"target_size {target_size}, unit {unit}, max_aspect {max_aspect}: target_size must be at least one unit, "
            f"max_aspect at least 1"
        )
    area = (target_size // unit) ** 2
    sizes = []
    columns, rows = area, 1
    while columns > 0:
        if max(columns, rows) <= max_aspect * min(columns, rows):
            sizes.append((rows * unit, columns * unit))
        if (rows + 1) * columns <= area:
            rows += 1
        else:
            columns -= 1
    return (*sizes, *_ADDED_SIZES.get((target_size, unit), ()))


def bucket_for(height: int, width: int, target_size: int, unit: int = 32, max_aspect: float = 4.0) -> tuple[int, int]:
    """The (height, width) of the buckets that cuts least from a picture of this size; of equals the wider one."""
    if height < 1 or width < 1:
        raise UserError(f"a picture of {width}x{height} pixels has no aspect ratio; width and height must be positive")

    def kept(size: tuple[int, int]) -> float:
        across, down = size[1] / width, size[0] / height
        return min(across, down) / max(across, down)

    return max(bucket_sizes(target_size, unit, max_aspect), key=kept)
