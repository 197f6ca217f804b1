"""Drawing of synthetic scenes: a `Scene` -> the frames of its clip.

The share of each pixel that an object covers is computed exactly or nearly so; positions are not rounded to pixels.
"""

from __future__ import annotations

import numpy as np

from lumos.data.synthetic import digits, solids, sprites
from lumos.data.synthetic.scene import BACKGROUNDS, COLOURS, GRADIENTS, Scene, SceneObject, Solid

DIGIT_PIXEL = 3.0
"""Side in pixels of one pixel of a digit's image."""
DIGIT_RADIUS = 4.5 * DIGIT_PIXEL
"""Half of the 8 pixels of an image, plus half a pixel for the soft edge that enlarging adds."""
SPRITE_RADIUS = 12.0


def render(scene: Scene) -> np.ndarray:
    """Draw a scene and return its frames, uint8 [T, H, W, 3].

    Edges are smooth over one pixel. Positions are not rounded to pixels.
    """
    if scene.objects and isinstance(scene.objects[0], Solid):
        return solids.views(scene.objects[0], (scene.height, scene.width), scene.num_frames)
    video = np.empty((scene.num_frames, scene.height, scene.width, 3), np.uint8)
    video[:] = np.rint(ground_colours(scene.background, scene.height))[:, None]
    for obj in scene.objects:
        _draw(video, obj)
    return video


def ground_colours(background: str, height: int) -> np.ndarray:
    """Return the colour of each row of a background, float64 [H, 3] in 0..255."""
    top, bottom = GRADIENTS[background] if background in GRADIENTS else (BACKGROUNDS[background],) * 2
    share = ((np.arange(height) + 0.5) / height)[:, None]
    return (1 - share) * np.array(top) + share * np.array(bottom)


def _draw(video: np.ndarray, obj: SceneObject) -> None:
    num_frames, height, width, _ = video.shape
    x, y, radius = obj.path(num_frames)
    # The box around the object has the same size in every frame, so that one array [T, box, box] holds all frames.
    box = int(np.ceil(2 * radius.max())) + 2
    box_y, box_x = min(box, height), min(box, width)
    left = np.clip(np.floor(x - box_x / 2 + 0.5), 0, width - box_x).astype(int)
    top = np.clip(np.floor(y - box_y / 2 + 0.5), 0, height - box_y).astype(int)
    # Centres of the pixels relative to the centre of the object, [T, box].
    dx = (left[:, None] + np.arange(box_x) + 0.5 - x[:, None]).astype(np.float32)
    dy = (top[:, None] + np.arange(box_y) + 0.5 - y[:, None]).astype(np.float32)
    r = radius[:, None].astype(np.float32)
    if obj.shape == "sprite":
        picture = sprite_pixels(sprites.load(obj.sprite), dx, dy, r)
        ink, coverage = 255 * picture[..., :3], picture[..., 3]
    elif obj.shape == "digit":
        coverage = _digit_coverage(digits.load()[0][obj.digit_image], dx, dy, r)
    else:
        coverage = _shape_coverage(obj.shape, dx, dy, r)
    if obj.colour:
        ink = coverage[..., None] * np.array(COLOURS[obj.colour], np.float32)
    for frame, alpha in enumerate(coverage[..., None]):
        place = video[frame, top[frame] : top[frame] + box_y, left[frame] : left[frame] + box_x]
        place[:] = np.rint(place + (ink[frame] - alpha * place))


def _shape_coverage(shape: str, dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return the share of each pixel that a shape covers, [T, box, box] in [0, 1].

    dx, dy [T, box] are the pixel centres relative to the centre of the shape, and r [T, 1] is its
    radius, all in pixels.
    """
    if shape == "circle":
        distance = np.sqrt(dx[:, None, :] ** 2 + dy[:, :, None] ** 2)
        return np.clip(r[:, None] - distance + 0.5, 0, 1)
    if shape == "square":
        return _bar(dx, r)[:, None, :] * _bar(dy, r)[:, :, None]
    if shape == "plus":
        arm_x, arm_y = _bar(dx, r / 3)[:, None, :], _bar(dy, r / 3)[:, :, None]
        return _bar(dx, r)[:, None, :] * arm_y + arm_x * _bar(dy, r)[:, :, None] - arm_x * arm_y
    # Triangle: abs(dx) treats both slanted sides at once; a side goes down by 2 pixels for 1 pixel across.
    outside = (2 * np.abs(dx)[:, None, :] - (dy + r)[:, :, None]) / np.float32(5**0.5)
    return np.clip(0.5 - outside, 0, 1) * _bar(dy, r)[:, :, None]


def _bar(d: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Return the exact share of each pixel with centre d that lies in [-half, half]."""
    return np.clip(np.minimum(d + 0.5, half) - np.maximum(d - 0.5, -half), 0, 1)


def _digit_coverage(ink: np.ndarray, dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return the coverage [T, box, box] of an 8 x 8 image that is enlarged bilinearly to radius r.

    dx, dy and r are those of `_shape_coverage`; positions are exact to fractions of a pixel.
    """
    cell = r * (DIGIT_PIXEL / DIGIT_RADIUS)
    grid = np.arange(8, dtype=np.float32) - 3.5
    across, down = (np.maximum(0, 1 - np.abs((d / cell)[..., None] - grid)) for d in (dx, dy))  # [T, box, 8]
    return down @ ink @ across.transpose(0, 2, 1)


def sprite_pixels(picture: np.ndarray, dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return the premultiplied RGBA of each pixel, [T, box, box, 4], of a picture scaled to a side of 2 r.

    The picture goes through a triangular filter, which is integrated over each pixel of the picture.
    This keeps the sum, the mean position and the opacity exact at any size. dx, dy and r are those of
    `_shape_coverage`.
    """
    edges = np.linspace(-1, 1, len(picture) + 1, dtype=np.float32) * r  # [T, side + 1]
    across, down = (np.diff(_triangle_integral(edges[:, None] - d[..., None])) for d in (dx, dy))  # [T, box, side]
    rows = np.einsum("tbs,sxc->tbxc", down, picture, optimize=True)
    return np.einsum("tax,tbxc->tbac", across, rows, optimize=True).clip(0, 1)


def _triangle_integral(end: np.ndarray) -> np.ndarray:
    """Return the area left of `end` under the triangle with corners (-1, 0), (0, 1) and (1, 0)."""
    end = end.clip(-1, 1)
    return 0.5 + end - end * np.abs(end) / 2
