"""Buckets: crop sizes of almost equal area, one for each aspect ratio.

The published recipe uses buckets so that the lengths of sequences hardly vary. A ``target_size`` of
S stands for an area of S x S pixels. Height and width are multiples of a unit (32 pixels as
published), because the size tokens of a sequence count units. All sizes are (height, width) in pixels.
"""

from __future__ import annotations

from functools import lru_cache

from lumos.errors import UserError

# The published size table has 768x480 (width x height), which the walk below does not reach.
# It is added for the target size of that table only.
_ADDED_SIZES = {(656, 32): ((480, 768),)}


@lru_cache
def bucket_sizes(target_size: int, unit: int = 32, max_aspect: float = 4.0) -> tuple[tuple[int, int], ...]:
    """Return the sizes (height, width) of the buckets in pixels, widest first.

    Each bucket has at most ``target_size ** 2`` pixels and cannot grow in height without exceeding
    that area. The function walks along the staircase of rectangles with at most
    ``(target_size // unit) ** 2`` square units: it adds a row while the area allows one, otherwise it
    removes a column. A size is a bucket if its long side is at most ``max_aspect`` times its short side.
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
    """Return the bucket (height, width) that crops least from a picture of this size.

    If two buckets crop equally, the wider one is returned.
    """
    if height < 1 or width < 1:
        raise UserError(f"a picture of {width}x{height} pixels has no aspect ratio; width and height must be positive")

    def kept(size: tuple[int, int]) -> float:
        across, down = size[1] / width, size[0] / height
        return min(across, down) / max(across, down)

    return max(bucket_sizes(target_size, unit, max_aspect), key=kept)
