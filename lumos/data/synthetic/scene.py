"""What a synthetic scene holds: objects, their looks and motions, and what is held out of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "plus")

SIZES = {"small": 7.0, "large": 12.0}

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "magenta": (215, 60, 200),
    "cyan": (60, 205, 215),
    "white": (240, 240, 240),
}

BACKGROUNDS = {"black": (10, 10, 10), "gray": (110, 110, 110), "navy": (20, 25, 70)}

GRADIENTS = {
    "sky": ((70, 140, 230), (190, 225, 250)),
    "sunset": ((70, 45, 120), (245, 150, 90)),
    "meadow": ((165, 215, 245), (70, 150, 75)),
}
"""Colours at the top and at the bottom. Only sprites move over them, whose colours no gradient can be mistaken for."""

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

GROWTH = {"grows": 1.6, "shrinks": 0.5}
"""Radius at the last frame over radius at the first."""

MOTIONS = (*DIRECTIONS, "still", *GROWTH)

DIGIT_MOTIONS = SPRITE_MOTIONS = (*DIRECTIONS, "still")

KINDS = ("shapes", "digits", "sprites")

SPLITS = ("train", "held_out", "all")

BASE_SIDE = 64

HELD_OUT_SPRITES = (("rocket", "down"), ("owl", "up"), ("apple", "left"), ("car", "up"), ("fish", "right"), ("star", "still"))


@dataclass(frozen=True)
class SceneObject:
    """One object. Lengths in pixels of the canvas it is drawn on."""

    shape: str  # one of SHAPES, or "digit", or "sprite"
    colour: str  # "" for a sprite
    size: str  # one of SIZES, or "" for a digit or a sprite
    motion: str  # one of MOTIONS
    radius: float = 0.0  # half width at the first frame
    radius_end: float = 0.0  # half width at the last frame
    x0: float = 0.0  # centre at the first frame
    y0: float = 0.0
    speed: float = 0.0  # pixels a frame along the motion's direction
    digit: int | None = None  # 0 to 9
    digit_image: int | None = None  # which image of lumos.data.synthetic.digits
    sprite: str | None = None  # which picture of lumos.data.synthetic.sprites

    def path(self, num_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centre x, centre y and radius in every frame, float64 [T] each."""
        frame = np.arange(num_frames)
        dx, dy = DIRECTIONS.get(self.motion, (0, 0))
        radius = self.radius + (self.radius_end - self.radius) * frame / max(num_frames - 1, 1)
        return self.x0 + dx * self.speed * frame, self.y0 + dy * self.speed * frame, radius


@dataclass(frozen=True)
class Scene:
    """All that is to know about one clip."""

    objects: tuple[SceneObject, ...]
    background: str
    caption: str
    num_frames: int
    fps: int
    height: int
    width: int


def is_held_out(obj: SceneObject) -> bool:
    """Combinations kept out of training to test composition: magenta triangles, yellow pluses, growing blue squares, and
    for a few sprites one of their motions."""
    if obj.shape == "sprite":
        return (obj.sprite, obj.motion) in HELD_OUT_SPRITES
    kind = (obj.colour, obj.shape)
    return kind in (("magenta", "triangle"), ("yellow", "plus")) or (*kind, obj.motion) == ("blue", "square", "grows")
