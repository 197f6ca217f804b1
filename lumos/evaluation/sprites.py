"""A checker that decides from the pixels of a clip which sprites it shows and how they move.

Sprites are the small pictures of `lumos.data.synthetic.sprites`. A patch of pixels that differ from
the ground, the colour of the background as measured in the clip, is an object. It gets the name of
the sprite whose picture is most similar, if that is drawn on the same ground at the best of a few
positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import permutations
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage

from lumos.data.synthetic import sprites
from lumos.data.synthetic.drawing import SPRITE_RADIUS, ground_colours, sprite_pixels
from lumos.data.synthetic.scene import BACKGROUNDS, BASE_SIDE, GRADIENTS
from lumos.evaluation.motion import MAX_BACKGROUND_DISTANCE, as_clip, line_ends, motion_word

# Lengths and areas are in pixels of a 64 x 64 frame and are scaled for other sizes.
# Colour distances are Euclidean in RGB, 0 to 255.
MIN_CONTRAST = 32.0
"""The least colour distance of an object's pixel from the ground."""
MIN_AREA = 40.0
"""The least area of a sprite. The smallest sprite has about 150 pixels."""
LARGEST = 2 * SPRITE_RADIUS + 2.5
"""Connected pieces that together fit into a box of this side belong to one sprite."""
MIN_VISIBLE = 0.75
"""The least share of the frames that must show the median number of sprites."""
MIN_LIKENESS = 0.6
"""The least correlation with the most similar picture. With less, the sprite is "unclear"."""
REACH = 3
"""A picture is compared at positions up to this many pixels from the centre of the patch, in both directions."""
VIEWS = 6
"""The number of frames in which a sprite is compared with the pictures."""


@dataclass(frozen=True)
class SeenSprite:
    """The measurements of one sprite.

    A value is "unclear" if no picture or no word of the captions fits.
    """

    sprite: str
    motion: str
    likeness: float  # correlation with the most similar picture
    way: tuple[float, float]  # displacement from the first to the last frame, pixels


@dataclass(frozen=True)
class _Patch:
    x: float  # centre of mass
    y: float
    area: float
    box: tuple[int, int, int, int]  # left, top, right, bottom


def inspect_sprites(video: np.ndarray) -> tuple[str, list[SeenSprite], int]:
    """Return (background, sprites, number of sprites) of a clip, uint8 [T, H, W, 3].

    The list of sprites is empty if there are none, more than three, or if their number changes too
    often.
    """
    video = as_clip(video)
    scale = min(video.shape[1:3]) / BASE_SIDE
    name, ground = _background(video)
    patches = [_patches(frame, ground, scale) for frame in video]
    count = int(np.median([len(found) for found in patches]))
    usable = [i for i, found in enumerate(patches) if len(found) == count]
    if not 0 < count <= 3 or len(usable) < MIN_VISIBLE * len(video):
        return name, [], count
    tracks = _tracks([patches[i] for i in usable])
    return name, [_measure(video, ground, usable, track, scale) for track in tracks], count


def _background(video: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the name of the ground, and its colour in every row, float32 [H, 3], the median of the columns at both sides.

    The ground has a colour for each row because some backgrounds are vertical gradients.
    """
    sides = np.concatenate([video[:, :, :2], video[:, :, -2:]], axis=2)
    ground = np.median(sides, axis=(0, 2)).astype(np.float32)
    distance = {
        name: float(np.linalg.norm(ground - ground_colours(name, len(ground)), axis=-1).mean())
        for name in (*BACKGROUNDS, *GRADIENTS)
    }
    nearest = min(distance, key=distance.get)
    return (nearest if distance[nearest] < MAX_BACKGROUND_DISTANCE else "unclear"), ground


def _patches(frame: np.ndarray, ground: np.ndarray, scale: float) -> list[_Patch]:
    """Return the sprites of a frame.

    Connected pieces are joined if they fit into the box of one sprite.
    """
    mask = np.linalg.norm(frame - ground[:, None], axis=-1) > MIN_CONTRAST
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    pieces = []
    for label, place in enumerate(ndimage.find_objects(labels), 1):
        rows, columns = place
        pieces.append((int((labels[place] == label).sum()), label, (columns.start, rows.start, columns.stop, rows.stop)))
    objects: list[tuple[list[int], tuple[int, int, int, int]]] = []
    for area, label, box in sorted(pieces, reverse=True):
        if area < 3 * scale**2:
            continue
        for i, (members, other) in enumerate(objects):
            union = (*np.minimum(box[:2], other[:2]), *np.maximum(box[2:], other[2:]))
            if max(union[2] - union[0], union[3] - union[1]) <= LARGEST * scale:
                objects[i] = ([*members, label], union)
                break
        else:
            objects.append(([label], box))
    found = []
    for members, box in objects:
        y, x = np.nonzero(np.isin(labels, members))
        if len(x) >= MIN_AREA * scale**2:
            found.append(_Patch(x.mean() + 0.5, y.mean() + 0.5, float(len(x)), tuple(map(int, box))))
    return found


def _tracks(frames: list[list[_Patch]]) -> list[list[_Patch]]:
    """Return the patches of each object over all frames.

    The patches of a frame are assigned to the objects so that the sum of their distances to the
    previous frame is least.
    """
    ordered = [frames[0]]
    for patches in frames[1:]:
        ordered.append(min(map(list, permutations(patches)), key=partial(_total_distance, ordered[-1])))
    return [list(track) for track in zip(*ordered, strict=True)]


def _total_distance(before: list[_Patch], after: list[_Patch]) -> float:
    return sum(np.hypot(a.x - b.x, a.y - b.y) for a, b in zip(before, after, strict=True))


def _measure(video: np.ndarray, ground: np.ndarray, frames: list[int], track: list[_Patch], scale: float) -> SeenSprite:
    at = np.array(frames)
    (x0, x1), (y0, y1), (r0, r1) = (
        line_ends(at, np.array(values), len(video))
        for values in ([p.x for p in track], [p.y for p in track], [p.area**0.5 for p in track])
    )
    few = np.unique(np.linspace(0, len(track) - 1, VIEWS).round().astype(int))
    likeness = np.mean([_likeness(video[frames[i]], ground, track[i].box, scale) for i in few], axis=0)
    best = int(likeness.argmax())
    name = sprites.SPRITES[best] if likeness[best] >= MIN_LIKENESS else "unclear"
    motion = motion_word((x1 - x0, y1 - y0), max(r1, 0.0) / max(r0, 1e-6), len(video), scale)
    return SeenSprite(name, motion, float(likeness[best]), (x1 - x0, y1 - y0))


def _likeness(frame: np.ndarray, ground: np.ndarray, box: tuple[int, int, int, int], scale: float) -> np.ndarray:
    """Return the correlation, -1 to 1, of a patch with the picture of every sprite at its best position, [sprites].

    Both are taken as differences from the ground.
    """
    pictures = _pictures(sprites.folder(), scale)
    side, step = pictures.shape[1], max(1, round(scale))
    reach = REACH * step
    span = side + 2 * reach
    left, top = (side - reach + round((box[at] + box[at + 2] - side) / 2) for at in (0, 1))
    difference = np.pad(frame - ground[:, None], ((side, side), (side, side), (0, 0)))[top : top + span, left : left + span]
    ground = np.pad(ground, ((side, side), (0, 0)), "edge")[top : top + span]
    # Axes: p vertical positions, q horizontal positions, n pictures, a rows, b columns, c channels. A picture drawn on the
    # ground differs from it by colour - alpha * ground, where colour is premultiplied. Its products and squares are sums over
    # these two terms, so no picture needs to be drawn at each position, which would be slow.
    colour, alpha = pictures[..., :3], pictures[..., 3]
    seen = sliding_window_view(difference, (side, side), axis=(0, 1))[::step, ::step].transpose(0, 1, 3, 4, 2)  # [p, q, a, b, c]
    under = sliding_window_view(ground, side, axis=0)[::step].transpose(0, 2, 1)  # [p, a, c]
    product = np.einsum("nabc,pqabc->npq", colour, seen, optimize=True)
    product -= np.einsum("nab,pqabc,pac->npq", alpha, seen, under, optimize=True)
    square = np.einsum("nabc,nabc->n", colour, colour)[:, None]
    square = square - 2 * np.einsum("nabc,nab,pac->np", colour, alpha, under, optimize=True)
    square += np.einsum("nab,nab,pac,pac->np", alpha, alpha, under, under, optimize=True)
    length = np.sqrt(square.clip(0))[:, :, None] * np.sqrt(np.einsum("pqabc,pqabc->pq", seen, seen))
    return (product / (length + 1e-6)).max((1, 2))


@lru_cache(maxsize=4)
def _pictures(folder: Path, scale: float) -> np.ndarray:
    """Return the pictures of all sprites at their usual size, float32 [sprites, side, side, 4].

    Colours are 0 to 255 and premultiplied by alpha, which is 0 to 1. `folder`, the source of the
    pictures, is only part of the key of the cache.
    """
    radius = np.float32(SPRITE_RADIUS * scale)
    side = int(np.ceil(2 * radius)) + 2
    d = (np.arange(side, dtype=np.float32) + 0.5 - side / 2)[None]
    drawn = np.stack([sprite_pixels(sprites.load(name), d, d, radius[None, None])[0] for name in sprites.SPRITES])
    return drawn * np.array([255, 255, 255, 1], np.float32)
