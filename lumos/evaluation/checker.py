"""A checker that decides from the pixels of a clip whether it shows the synthetic scene that a caption describes.

Synthetic scenes are those of `lumos.data.synthetic.sampling`. The checker knows their words and
colours, but not how they are drawn: it measures background, objects, colour, shape, size and
motion. So the same code judges rendered, reconstructed and generated clips. Objects are told apart
by their colour. Two objects of one colour are measured as one object of unclear shape, and counted
as two.

    check_clip(video, "a red circle moves left")   -> {"count": True, "colour": True, "shape": False, ..., "all": False}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from scipy import ndimage

from lumos.data.synthetic import digits
from lumos.data.synthetic.drawing import DIGIT_PIXEL
from lumos.data.synthetic.scene import BACKGROUNDS, BASE_SIDE, COLOURS, SHAPES, SIZES, Scene
from lumos.errors import UserError
from lumos.evaluation.captions import parse_caption, scene_attributes
from lumos.evaluation.motion import MAX_BACKGROUND_DISTANCE, as_clip, line_ends, motion_word
from lumos.evaluation.sprites import SeenSprite, inspect_sprites

# Lengths and areas are in pixels of a 64 x 64 frame and are scaled for other sizes.
# Colour distances are Euclidean in RGB, 0 to 255.
# "Ground" is the colour of the background as measured in the clip.
MIN_CONTRAST = 45.0
"""The least colour distance of an object's pixel from the ground.

The most similar object and background have distance 110.
"""
MAX_COLOUR_DISTANCE = 70.0
"""The most colour distance of an object's pixel from the line between the ground and the colour."""
MIN_SHARE = 0.55
"""The least share of a colour in the mixture of a pixel that counts as evidence of it.

Thin strokes never have the full colour.
"""
MIN_AREA = 15.0
"""The least area of an object, as the median over the frames. A smaller patch is noise."""
MIN_AREA_IN_FRAME = 4.0
"""The least area of an object in a frame in which it counts as visible."""
MIN_VISIBLE = 0.75
"""The least share of the frames in which an object must be visible."""
MIN_SHAPE_SCORE = 0.65
"""The least overlap with an ideal shape. With less, the shape is "unclear"."""
DIGIT_GRID = 20
"""Samples per side of the grid on which digits are compared: two per pixel of the 8 x 8 images, around the centre of mass."""

AREA_OF_UNIT = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "plus": 20 / 9}
"""Area of a shape with radius (half width) 1."""


@dataclass(frozen=True)
class Seen:
    """The measurements of one object; lengths are in pixels.

    A value is "unclear" if no word of the captions fits.
    """

    colour: str
    shape: str  # one of SHAPES, "digit" or "unclear"
    digit: int | None
    size: str  # at the first frame
    motion: str  # one of MOTIONS or "unclear"
    score: float  # overlap with the ideal shape, 0 to 1
    radius: float  # at the first frame
    way: tuple[float, float]  # displacement from the first to the last frame
    growth: float  # radius at the last frame over radius at the first


@dataclass(frozen=True)
class Observation:
    """The content of a clip: the number of its objects, and one `Seen` for each colour among them."""

    background: str
    objects: tuple[Seen, ...]
    count: int


def inspect_clip(video: np.ndarray) -> Observation:
    """Measure the background and the objects of a clip, uint8 [T, H, W, 3].

    UserError for another shape or type.
    """
    video = as_clip(video)
    scale = min(video.shape[1:3]) / BASE_SIDE
    name, ground = _background(video)
    difference = video.astype(np.float32) - ground  # [T, H, W, 3]
    objects, count = [], 0
    labels = _label_by_colour(difference, ground, scale)
    for colour in np.unique(labels[labels >= 0]):
        own, fragments = _without_small_patches(labels == colour)
        near = ndimage.binary_dilation(own, np.ones((1, 3, 3))) & ((labels < 0) | own)
        obj = _measure(_coverage(difference, own, near), tuple(COLOURS)[colour], scale)
        if obj is None:
            continue
        objects.append(obj)
        count += 1 if obj.shape == "digit" else fragments
    return Observation(name, tuple(objects), count)


def check_clip(video: np.ndarray, wanted: Scene | dict | str) -> dict[str, bool]:
    """Compare a clip, uint8 [T, H, W, 3], with a caption, with attributes from `parse_caption`, or with all attributes of a scene.

    Return {attribute: whether it is right}. The keys are count, colour, shape (for a digit: which
    digit), sprite, size, motion, background, and all. Only attributes that are named are checked: a
    caption without a size gives no "size". With two objects an attribute is right if it is right
    for both. UserError if the caption cannot be parsed.
    """
    if isinstance(wanted, Scene):
        wanted = scene_attributes(wanted)
    elif isinstance(wanted, str):
        wanted = parse_caption(wanted)
    background, found, count = _look(video, wanted)
    result = {"count": count == len(wanted["objects"])}
    objects = [*found, *[None] * len(wanted["objects"])]
    answers = [
        [_compare(obj, ask) for obj, ask in zip(order, wanted["objects"], strict=True)]
        for order in permutations(objects, len(wanted["objects"]))
    ]
    best = max(answers, key=lambda answer: sum(sum(one.values()) for one in answer))
    for key in ("colour", "shape", "sprite", "size", "motion"):
        named = [one[key] for one in best if key in one]
        if named:
            result[key] = all(named)
    if "background" in wanted:
        result["background"] = background == wanted["background"]
    return {**result, "all": all(result.values())}


def check_identity(frame: np.ndarray, wanted: dict) -> dict[str, bool]:
    """Compare one frame, uint8 [H, W, 3], with attributes as `check_clip` does, except for size, motion and background."""
    objects = [{key: value for key, value in obj.items() if key not in ("size", "motion")} for obj in wanted["objects"]]
    return check_clip(np.asarray(frame)[None], {"objects": objects})


def identities(frame: np.ndarray, wanted: dict) -> list[tuple]:
    """Return the (colour, shape, digit or -1), or the (sprite,), of each object in a frame, uint8 [H, W, 3], sorted."""
    _, objects, _ = _look(as_clip(np.asarray(frame)[None]), wanted)
    return sorted((t.sprite,) if isinstance(t, SeenSprite) else (t.colour, t.shape, t.digit or -1) for t in objects)


def _look(video: np.ndarray, wanted: dict) -> tuple[str, Sequence[Seen | SeenSprite], int]:
    """Return (background, objects, number of objects), measured as sprites if `wanted` names sprites."""
    are_sprites = {"sprite" in obj for obj in wanted["objects"]}
    if len(are_sprites) > 1:
        raise UserError("a sprite beside a shape or digit cannot be checked: no scene shows them together; ask for one kind")
    if True in are_sprites:
        return inspect_sprites(video)
    seen = inspect_clip(video)
    return seen.background, seen.objects, seen.count


def _compare(obj: Seen | SeenSprite | None, ask: dict) -> dict[str, bool]:
    keys = [key for key in ("colour", "shape", "sprite", "size", "motion") if key in ask]
    answer = {key: obj is not None and getattr(obj, key) == ask[key] for key in keys}
    if "digit" in ask:
        answer["shape"] = obj is not None and obj.digit == ask["digit"]
    return answer


def _background(video: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the name and the colour of the ground: the median of a border of two pixels, over all frames."""
    border = np.ones(video.shape[1:3], bool)
    border[2:-2, 2:-2] = False
    ground = np.median(video[:, border].reshape(-1, 3), axis=0).astype(np.float32)
    name, distance = _nearest(ground, BACKGROUNDS)
    return (name if distance < MAX_BACKGROUND_DISTANCE else "unclear"), ground


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    distance = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in palette.items()}
    name = min(distance, key=distance.get)
    return name, distance[name]


def _label_by_colour(difference: np.ndarray, ground: np.ndarray, scale: float) -> np.ndarray:
    """Return the index of the colour that each pixel belongs to, -1 for the background, int [T, H, W].

    difference: the pixels minus the ground. The pixels of a soft edge are mixtures of the ground
    and a colour. So a pixel belongs to the colour whose line from the ground passes nearest to it.
    Only colours with enough pixels of their own take part, because a mixture of the ground and one
    colour may lie near the line of another.
    """
    labels = np.full(difference.shape[:3], -1)
    mask = np.linalg.norm(difference, axis=-1) > MIN_CONTRAST
    pixels = difference[mask]  # [N, 3]
    lines = np.array(list(COLOURS.values()), np.float32) - ground  # [7, 3]
    share = np.clip(pixels @ lines.T / (lines**2).sum(-1), 0, 1.1)  # [N, 7]
    off = np.linalg.norm(pixels[:, None] - share[..., None] * lines, axis=-1)  # [N, 7]
    core = (off == off.min(1, keepdims=True)) & (off < MAX_COLOUR_DISTANCE) & (share > MIN_SHARE)
    frame = np.nonzero(mask)[0]
    areas = np.stack([np.bincount(frame, core[:, k], len(labels)) for k in range(len(lines))])  # [7, T]
    visible = (areas >= MIN_AREA_IN_FRAME * scale**2).mean(1) >= MIN_VISIBLE
    real = visible & (np.median(areas, axis=1) >= MIN_AREA * scale**2)
    if real.any():
        labels[mask] = np.where(real, off, np.inf).argmin(1)
    return labels


def _without_small_patches(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the mask without small patches, and the median number of large patches per frame.

    A patch is small below a tenth of the largest patch of its frame, and large above a quarter.
    """
    within_frame = np.zeros((3, 3, 3))
    within_frame[1] = 1
    patches, _ = ndimage.label(mask, within_frame)
    area = np.bincount(patches.ravel())
    area[0] = 0
    area = area[patches]  # [T, H, W]: the area of the patch that the pixel belongs to
    share = area / np.maximum(area.max((1, 2), keepdims=True), 1)
    large = [len(np.unique(frame[big])) for frame, big in zip(patches, share > 0.25, strict=True)]
    return share > 0.1, max(1, int(np.median(large)))


def _coverage(difference: np.ndarray, own: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Return the share of each pixel that an object covers, 0 to 1, [T, H, W].

    The shares are relative to the object's own colour, which is measured from its strongest pixels.
    own: the mask of the object; near: the same mask with its soft edge.
    """
    pixels = difference[own]
    strength = np.linalg.norm(pixels, axis=-1)
    line = np.median(pixels[strength >= np.quantile(strength, 0.6)], axis=0)
    return np.where(near, np.clip(difference @ line / (line @ line), 0, 1), 0)


def _measure(coverage: np.ndarray, colour: str, scale: float) -> Seen | None:
    """Return what was measured, or None if the object covers too little of every frame."""
    num_frames, height, width = coverage.shape
    area = coverage.sum((1, 2))
    seen = np.nonzero(area >= MIN_AREA_IN_FRAME * scale**2)[0]
    if not len(seen):
        return None
    x = coverage.sum(1)[seen] @ (np.arange(width) + 0.5) / area[seen]
    y = coverage.sum(2)[seen] @ (np.arange(height) + 0.5) / area[seen]
    few = np.unique(np.linspace(0, len(seen) - 1, 6).round().astype(int))
    views = [(coverage[seen[i]], x[i], y[i], area[seen[i]]) for i in few]
    # Frames in which the object is larger have more weight: a shape of a few pixels looks like a circle.
    weights = area[seen[few]]
    scores = {shape: float(np.average([_overlap(*view, shape) for view in views], weights=weights)) for shape in SHAPES}
    shape = max(scores, key=scores.get)
    score, digit = scores[shape], None
    if colour == "white":
        found, digit_score = _read_digit(views, scale)
        if digit_score > score:
            shape, score, digit = "digit", digit_score, found
    radii = np.sqrt(area[seen] / AREA_OF_UNIT.get(shape, np.pi))
    if shape == "triangle":
        y = y - radii / 3  # the centre of the box, which unlike the centre of mass stays in place when the triangle grows
    (x_first, x_last), (y_first, y_last), (radius, last) = (line_ends(seen, v, num_frames) for v in (x, y, radii))
    way, growth = (x_last - x_first, y_last - y_first), max(last, 0.0) / max(radius, 1e-6)
    size = "" if shape == "digit" else min(SIZES, key=lambda size: abs(radius - SIZES[size] * scale))
    if score < MIN_SHAPE_SCORE:
        shape, digit = "unclear", None
    return Seen(colour, shape, digit, size, motion_word(way, growth, num_frames, scale), score, radius, way, growth)


def _overlap(coverage: np.ndarray, x: float, y: float, area: float, shape: str) -> float:
    """Return the intersection over union of a coverage [H, W] and the ideal shape of the same area and centre of mass."""
    radius = np.sqrt(area / AREA_OF_UNIT[shape])
    thirds = (np.arange(3) + 0.5) / 3
    dx = ((np.arange(coverage.shape[1])[:, None] + thirds).ravel() - x) / radius
    dy = ((np.arange(coverage.shape[0])[:, None] + thirds).ravel()[:, None] - y) / radius
    if shape == "circle":
        inside = dx**2 + dy**2 <= 1
    elif shape == "triangle":
        # The centre of mass of the triangle lies a third of the radius below the centre of its box.
        inside = (dy <= 2 / 3) & (2 * np.abs(dx) <= dy + 4 / 3)
    else:
        dx, dy = np.abs(dx), np.abs(dy)
        inside = (dx <= 1) & (dy <= 1)
        if shape == "plus":
            inside &= (dx <= 1 / 3) | (dy <= 1 / 3)
    ideal = inside.reshape(coverage.shape[0], 3, coverage.shape[1], 3).mean((1, 3))
    return float(np.minimum(coverage, ideal).sum() / np.maximum(coverage, ideal).sum())


@lru_cache(maxsize=1)
def _digit_references() -> tuple[np.ndarray, np.ndarray]:
    """Return the UCI images sampled around their centres of mass, [N, DIGIT_GRID ** 2], and their digits [N]."""
    images, labels = digits.load()
    middle = np.arange(8) + 0.5
    ink = images.sum((1, 2))
    sampled = [
        _sample(image, image.sum(0) @ middle / total, image.sum(1) @ middle / total, 1.0)
        for image, total in zip(images, ink, strict=True)
    ]
    references = np.stack(sampled)
    return references, labels


def _sample(image: np.ndarray, x: float, y: float, cell: float) -> np.ndarray:
    """Return bilinear samples of an image on the digit grid centred at (x, y). cell: the width of a digit's pixel in the image."""
    grid = (np.arange(DIGIT_GRID) - (DIGIT_GRID - 1) / 2) * cell / 2
    at = np.meshgrid(y + grid - 0.5, x + grid - 0.5, indexing="ij")
    return ndimage.map_coordinates(image, at, order=1, mode="grid-constant").ravel()


def _read_digit(views: list, scale: float) -> tuple[int, float]:
    """Return the digit of the most similar UCI image, and the overlap of that image with the mean of the views."""
    seen = np.mean([_sample(coverage, x, y, DIGIT_PIXEL * scale) for coverage, x, y, _ in views], axis=0)
    references, labels = _digit_references()
    # The correlation does not depend on contrast, so a softer or fainter digit still matches its image.
    nearest = int((references @ (seen - seen.mean()) / np.linalg.norm(references, axis=1)).argmax())
    ideal = references[nearest]
    seen = seen * (ideal.sum() / seen.sum())
    return int(labels[nearest]), float(np.minimum(ideal, seen).sum() / np.maximum(ideal, seen).sum())
