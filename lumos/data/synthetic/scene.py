"""Synthetic scenes as data: objects, their attributes and motions, and combinations held out of training."""

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
"""Colours (r, g, b) at the top and at the bottom. Gradients appear only behind sprites, because a gradient cannot be
mistaken for the colours of a sprite."""

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

GROWTH = {"grows": 1.6, "shrinks": 0.5}
"""Radius at the last frame divided by the radius at the first frame."""

MOTIONS = (*DIRECTIONS, "still", *GROWTH)

DIGIT_MOTIONS = SPRITE_MOTIONS = (*DIRECTIONS, "still")

CAPTIONED_KINDS = ("shapes", "digits", "sprites")

KINDS = (*CAPTIONED_KINDS, "solids")

SPLITS = ("train", "held_out", "all")

BASE_SIDE = 64

HELD_OUT_SPRITES = (("rocket", "down"), ("owl", "up"), ("apple", "left"), ("car", "up"), ("fish", "right"), ("star", "still"))

SOLIDS = ("cube", "pyramid", "prism", "cylinder", "cone", "torus")

HELD_OUT_SOLIDS = (("cube", "cyan"), ("cone", "magenta"), ("torus", "yellow"))

VIEWS = ((30, 30), (90, -20), (150, 30), (210, -20), (270, 30), (330, -20))
"""The views of a solid after the input view, in degrees: azimuth from that of the input view on, and elevation."""

NUM_VIEWS = 1 + len(VIEWS)


@dataclass(frozen=True)
class SceneObject:
    """An object of a scene. Lengths are in pixels of the canvas."""

    shape: str  # one of SHAPES, or "digit", or "sprite"
    colour: str  # "" for a sprite
    size: str  # one of SIZES, or "" for a digit or a sprite
    motion: str  # one of MOTIONS
    radius: float = 0.0  # half of the width at the first frame
    radius_end: float = 0.0  # half of the width at the last frame
    x0: float = 0.0  # centre at the first frame, from the left
    y0: float = 0.0  # centre at the first frame, from the top
    speed: float = 0.0  # pixels per frame in the direction of the motion
    digit: int | None = None  # 0 to 9
    digit_image: int | None = None  # index of the image in lumos.data.synthetic.digits
    sprite: str | None = None  # name of the picture in lumos.data.synthetic.sprites

    def path(self, num_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return centre x, centre y and radius in each frame in pixels, float64 [T] each."""
        frame = np.arange(num_frames)
        dx, dy = DIRECTIONS.get(self.motion, (0, 0))
        radius = self.radius + (self.radius_end - self.radius) * frame / max(num_frames - 1, 1)
        return self.x0 + dx * self.speed * frame, self.y0 + dy * self.speed * frame, radius


@dataclass(frozen=True)
class Solid:
    """A solid object with the camera of its input view; `lumos.data.synthetic.solids` draws its views."""

    shape: str  # one of SOLIDS
    colours: tuple[str, str]  # of its two halves, two different ones of COLOURS
    radius: float  # of the sphere around it, above 0 up to 1; a sphere of radius 1 almost fills the picture
    azimuth: float  # of the input view, in degrees; 0 sees the half of the first colour
    elevation: float  # of the input view, in degrees
    background: str  # one of BACKGROUNDS

    @property
    def title(self) -> str:
        """A description for people, for example "cube, red and blue"; models never see it."""
        return f"{self.shape}, {self.colours[0]} and {self.colours[1]}"


@dataclass(frozen=True)
class Scene:
    """The content of a clip: objects, background and caption, with the size of the clip.

    The frames of a solid are its views. They have no caption ("").
    """

    objects: tuple[SceneObject, ...] | tuple[Solid]
    background: str
    caption: str
    num_frames: int
    fps: int
    height: int
    width: int


def is_held_out(obj: SceneObject | Solid) -> bool:
    """Return whether training never shows this combination of attributes, which tests composition.

    Held out are magenta triangles, yellow pluses, growing blue squares, for a few sprites one motion
    each (`HELD_OUT_SPRITES`), and for a few solids one colour each (`HELD_OUT_SOLIDS`).
    """
    if isinstance(obj, Solid):
        return any((obj.shape, colour) in HELD_OUT_SOLIDS for colour in obj.colours)
    if obj.shape == "sprite":
        return (obj.sprite, obj.motion) in HELD_OUT_SPRITES
    kind = (obj.colour, obj.shape)
    return kind in (("magenta", "triangle"), ("yellow", "plus")) or (*kind, obj.motion) == ("blue", "square", "grows")
