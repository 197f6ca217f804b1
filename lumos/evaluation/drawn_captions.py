"""The clip that a caption of synthetic scenes describes, drawn without a model, as a small picture of what a prompt asks for."""

from __future__ import annotations

from typing import Any

import numpy as np

from lumos.data.synthetic import digits
from lumos.data.synthetic.drawing import DIGIT_RADIUS, SPRITE_RADIUS, render
from lumos.data.synthetic.scene import BASE_SIDE, DIRECTIONS, GROWTH, SIZES, Scene, SceneObject
from lumos.evaluation.captions import parse_caption

FRAMES, FPS, SPEED = 9, 8, 2.0  # pixels per frame
MIDDLES = {1: (0.5,), 2: (0.28, 0.72)}
"""The height of each object, by their number, as shares of the canvas."""


def draw_caption(text: str) -> np.ndarray:
    """Return the clip of a caption of one or two objects, uint8 [T, H, W, 3]. What the caption does not name is chosen.

    UserError if the text does not have the form of the captions.
    """
    asked = parse_caption(text)
    places = MIDDLES[len(asked["objects"])]
    objects = tuple(_object(ask, place * BASE_SIDE) for ask, place in zip(asked["objects"], places, strict=True))
    return render(Scene(objects, asked.get("background", "black"), text, FRAMES, FPS, BASE_SIDE, BASE_SIDE))


def _object(ask: dict[str, Any], y: float) -> SceneObject:
    """Return an object with the attributes of `ask`, which passes its place (the middle, y) in the middle of the clip."""
    motion = ask.get("motion", "still")
    sprite, digit = ask.get("sprite"), ask.get("digit")
    size = "" if sprite or digit is not None else ask.get("size", "small")
    radius = SPRITE_RADIUS if sprite else DIGIT_RADIUS if digit is not None else SIZES[size]
    dx, dy = (way * SPEED * (FRAMES - 1) / 2 for way in DIRECTIONS.get(motion, (0, 0)))
    return SceneObject(
        shape="sprite" if sprite else ask["shape"], colour="" if sprite else ask.get("colour", "white"), size=size, motion=motion,
        radius=radius, radius_end=radius * GROWTH.get(motion, 1.0), x0=BASE_SIDE / 2 - dx, y0=y - dy, speed=SPEED, digit=digit,
        digit_image=None if digit is None else int(np.flatnonzero(digits.load()[1] == digit)[0]), sprite=sprite,
    )  # fmt: skip
