"""Sampling of synthetic scenes without end: shapes, digits and sprites that move, grow or shrink, and views of solids.

A scene is described exactly by a `Scene`, so that a generated clip can be checked against it. Clip
number `index` is a pure function of (seed, index, options). Any process can draw any clip at any time
and in any order, so a training run resumes exactly and a test set needs no files.

Geometry is in pixels, with x to the right and y down; pixel i covers [i, i + 1]. The lengths below are
for a canvas whose shorter side is 64 and are scaled with that side. The radius of a shape is half of
its width and half of its height: a square of radius 7 is 14 x 14, and a triangle of radius 7 has a base
of 14 and a height of 14. The centre `x0, y0` is the centre of that box. Solids have a geometry of their
own, that of `lumos.data.synthetic.solids`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from numbers import Integral, Real

import numpy as np

from lumos.data.synthetic import captions as wording
from lumos.data.synthetic import digits, sprites
from lumos.data.synthetic.drawing import DIGIT_RADIUS, SPRITE_RADIUS, render
from lumos.data.synthetic.scene import (
    BACKGROUNDS,
    BASE_SIDE,
    COLOURS,
    DIGIT_MOTIONS,
    DIRECTIONS,
    GRADIENTS,
    GROWTH,
    HELD_OUT_SOLIDS,
    HELD_OUT_SPRITES,
    KINDS,
    MOTIONS,
    NUM_VIEWS,
    SHAPES,
    SIZES,
    SOLIDS,
    SPLITS,
    SPRITE_MOTIONS,
    Scene,
    SceneObject,
    Solid,
    is_held_out,
)
from lumos.errors import UserError

SPEED = (1.2, 2.0)
"""Lowest and highest speed in pixels per frame. The speed is lower if the object would leave the canvas otherwise."""
MARGIN = 1.25
"""Least distance in pixels between an object and the border of the canvas, so that the soft edge of the object is
not cut off. It is not scaled down for a small canvas."""
GAP = 2.0
"""Least distance in pixels between two objects in each frame."""
SOLID_RADIUS = (0.75, 1.0)
SOLID_ELEVATION = (-20.0, 30.0)
"""Lowest and highest elevation of the input view of a solid in degrees: those of its other views."""


@dataclass(frozen=True)
class SyntheticScenes:
    """A sequence of clips without end: `scenes[index]` is (video uint8 [T, H, W, 3], caption) for any index >= 0.

    split "train"     no scene has a combination of attributes for which `is_held_out` is true
    split "held_out"  every scene has such a combination; a scene of a digit has an image that training
                      never shows; a picture (one frame) of sprites can have any sprite, because
                      only motions of sprites are held out
    split "all"       scenes of both kinds

    The frames of a solid are the first `num_frames` of its seven views: a picture is the input view.

    To validate on scenes like those of training, use "train" with another seed. Raise UserError for a
    value that is not allowed.
    """

    seed: int = 0
    split: str = "train"
    kinds: tuple[str, ...] = ("shapes", "digits")  # for "sprites" see lumos.data.synthetic.sprites
    share_solids: float = 0.5  # share of scenes with a solid, if there are other kinds too
    share_sprites: float = 0.35  # share of the other scenes with sprites, if there are further kinds
    share_digits: float = 0.15  # share of the remaining scenes with a digit, if there are shapes too
    share_two: float = 0.15  # share of scenes with two objects, among scenes of shapes and of sprites
    share_two_ways: float = 0.0  # of those, share in which both objects move, in different directions; 0: by chance
    share_size: float = 0.75  # share of captions that name the size
    share_background: float = 0.75  # share of captions that name the background
    wording: str = "plain"  # wording of captions, one of lumos.data.synthetic.captions.WORDINGS
    num_frames: int = 17
    fps: int = 8
    height: int = BASE_SIDE
    width: int = BASE_SIDE

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UserError(f"split {self.split!r} is unknown: take one of {', '.join(SPLITS)}")
        kinds = tuple(self.kinds) if isinstance(self.kinds, list | tuple) else (self.kinds,)
        if not kinds or any(kind not in KINDS for kind in kinds):
            raise UserError(f"kinds {self.kinds!r} is not possible: take one or more of {', '.join(KINDS)}")
        object.__setattr__(self, "kinds", kinds)
        if self.wording not in wording.WORDINGS:
            raise UserError(f"wording {self.wording!r} is unknown: take one of {', '.join(wording.WORDINGS)}")
        for name in (field for field in self.__dataclass_fields__ if field.startswith("share_")):
            if not isinstance(getattr(self, name), Real) or not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)!r} is not possible: take a number from 0 to 1")
        for name, least in (("seed", 0), ("num_frames", 1), ("fps", 1), ("height", 16), ("width", 16)):
            if not isinstance(getattr(self, name), Integral) or getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)!r} is not possible: take a whole number of {least} or more")
        if "solids" in kinds and self.num_frames > NUM_VIEWS:
            raise UserError(
                f"num_frames {self.num_frames} is not possible: a solid has {NUM_VIEWS} views; take {NUM_VIEWS} or fewer, or leave "
                "solids out of kinds"
            )

    def scene(self, index: int) -> Scene:
        """Return the scene of clip `index` without drawing it; raise IndexError for a negative index."""
        if index < 0:
            raise IndexError(f"clip {index} does not exist: clips are numbered from 0 on, without end")
        rng = np.random.default_rng([self.seed, index])
        kind = self._kind(rng)
        if kind == "solids":
            solid = self._sample_solid(rng)
            return Scene((solid,), solid.background, "", self.num_frames, self.fps, self.height, self.width)
        if kind == "digits":
            objects = (self._place(self._sample_digit(rng), rng),)
        else:
            sample = self._sample_sprite if kind == "sprites" else self._sample_shape
            two = rng.random() < self.share_two
            objects = self._sample_two(sample, rng) if two else (self._place(sample(rng, self.split), rng),)
        background = _pick(rng, (*BACKGROUNDS, *GRADIENTS) if kind == "sprites" else tuple(BACKGROUNDS))
        caption = wording.caption(
            objects, background, rng, wording=self.wording, moving=self.num_frames > 1,
            share_size=self.share_size, share_background=self.share_background,
        )  # fmt: skip
        return Scene(objects, background, caption, self.num_frames, self.fps, self.height, self.width)

    def _kind(self, rng: np.random.Generator) -> str:
        """Draw the kind of a scene among `kinds`, by the shares of solids, sprites and digits."""
        shares = {"solids": self.share_solids, "sprites": self.share_sprites, "digits": self.share_digits}
        left = [kind for kind in ("solids", "sprites", "digits", "shapes") if kind in self.kinds]
        while len(left) > 1:
            if rng.random() < shares[left[0]]:
                break
            left.pop(0)
        return left[0]

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        scene = self.scene(index)
        return render(scene), scene.caption

    def _sample_shape(self, rng: np.random.Generator, split: str) -> SceneObject:
        motions = MOTIONS if self.num_frames > 1 else ("still",)
        size = _pick(rng, tuple(SIZES))
        if split == "held_out":
            # A blue square is held out with one motion only, but it is drawn as often as the other two
            # combinations, which have all seven motions. A picture cannot show that the square grows.
            choices = (("magenta", "triangle", ""), ("yellow", "plus", ""), ("blue", "square", "grows"))
            colour, shape, motion = _pick(rng, choices if self.num_frames > 1 else choices[:2])
            return SceneObject(shape, colour, size, motion or _pick(rng, motions))
        while True:
            obj = SceneObject(_pick(rng, SHAPES), _pick(rng, tuple(COLOURS)), size, _pick(rng, motions))
            if split == "all" or not is_held_out(obj):
                return obj

    def _sample_digit(self, rng: np.random.Generator) -> SceneObject:
        image = int(rng.integers(*digits.image_range(self.split)))
        motion = _pick(rng, DIGIT_MOTIONS if self.num_frames > 1 else ("still",))
        return SceneObject("digit", "white", "", motion, digit=int(digits.load()[1][image]), digit_image=image)

    def _sample_sprite(self, rng: np.random.Generator, split: str) -> SceneObject:
        motions = SPRITE_MOTIONS if self.num_frames > 1 else ("still",)
        if split == "held_out" and self.num_frames > 1:
            name, motion = _pick(rng, HELD_OUT_SPRITES)
            return SceneObject("sprite", "", "", motion, sprite=name)
        while True:
            obj = SceneObject("sprite", "", "", _pick(rng, motions), sprite=_pick(rng, tuple(sprites.SPRITES)))
            if split != "train" or not self._holds_out(obj):
                return obj

    def _sample_solid(self, rng: np.random.Generator) -> Solid:
        camera = rng.uniform(0, 360), rng.uniform(*SOLID_ELEVATION)
        radius, background = rng.uniform(*SOLID_RADIUS), _pick(rng, tuple(BACKGROUNDS))
        while True:
            held_out = self.split == "held_out"
            shape, first = _pick(rng, HELD_OUT_SOLIDS) if held_out else (_pick(rng, SOLIDS), _pick(rng, tuple(COLOURS)))
            second = _pick(rng, tuple(colour for colour in COLOURS if colour != first))
            colours = (first, second) if rng.random() < 0.5 else (second, first)
            solid = Solid(shape, colours, radius, *camera, background)
            if self.split != "train" or not is_held_out(solid):
                return solid

    def _holds_out(self, sprite: SceneObject) -> bool:
        return self.num_frames > 1 and is_held_out(sprite)

    def _sample_two(
        self, sample: Callable[[np.random.Generator, str], SceneObject], rng: np.random.Generator
    ) -> tuple[SceneObject, SceneObject]:
        """Draw two shapes of different colours, or two different sprites, that do not touch in any frame.

        The second sprite gets the motion of the first in about half of the draws. Few positions are free
        for objects that move in different directions, so such scenes are rare unless `share_two_ways`
        asks for them.
        """
        # A share of 0 draws no random number, so that a seed gives the clips that it gave before this option existed.
        two_ways = self.share_two_ways > 0 and self.num_frames > 1 and rng.random() < self.share_two_ways
        while True:
            first = sample(rng, self.split)
            second = sample(rng, "all" if self.split == "held_out" else self.split)
            if two_ways:
                if first.motion == second.motion or not {first.motion, second.motion} <= DIRECTIONS.keys():
                    continue
            elif first.sprite and rng.random() < 0.5:
                second = replace(second, motion=first.motion)
                if self.split == "train" and self._holds_out(second):
                    continue
            if (first.colour or first.sprite) == (second.colour or second.sprite):
                continue
            if rng.random() < 0.5:
                first, second = second, first
            for _ in range(24):
                objects = self._place(first, rng), self._place(second, rng)
                if _apart(*objects, self.num_frames, GAP * self._scale):
                    return objects

    @property
    def _scale(self) -> float:
        return min(self.height, self.width) / BASE_SIDE

    def _place(self, obj: SceneObject, rng: np.random.Generator) -> SceneObject:
        """Return the object with size, start and speed such that it stays on the canvas in all frames."""
        radius = self._scale * ({"digit": DIGIT_RADIUS, "sprite": SPRITE_RADIUS}.get(obj.shape) or SIZES[obj.size])
        radius_end = radius * GROWTH.get(obj.motion, 1.0)
        border = max(radius, radius_end) + MARGIN * max(self._scale, 1.0)
        dx, dy = DIRECTIONS.get(obj.motion, (0, 0))
        steps = max(self.num_frames - 1, 1)
        room = (self.width if dx else self.height) - 2 * border
        fastest = min(SPEED[1] * self._scale, room / steps)
        speed = float(rng.uniform(min(SPEED[0] * self._scale, fastest), fastest)) if dx or dy else 0.0

        def start(side: int, direction: int) -> float:
            way = direction * speed * steps
            return float(rng.uniform(border + max(-way, 0.0), max(side - border - max(way, 0.0), border)))

        x0, y0 = start(self.width, dx), start(self.height, dy)
        return replace(obj, radius=radius, radius_end=radius_end, x0=x0, y0=y0, speed=speed)


def sample_scene(seed: int, index: int, **options) -> Scene:
    """Return scene `index` of a seed; `options` are the other fields of `SyntheticScenes`."""
    return SyntheticScenes(seed=seed, **options).scene(index)


def captions(seed: int, n: int, **options) -> Iterator[str]:
    """Yield the captions of the first n clips without drawing the clips, for example to train a text tokenizer."""
    scenes = SyntheticScenes(seed=seed, **options)
    return (scenes.scene(index).caption for index in range(n))


def _apart(a: SceneObject, b: SceneObject, num_frames: int, gap: float) -> bool:
    (ax, ay, ar), (bx, by, br) = a.path(num_frames), b.path(num_frames)
    return bool((np.maximum(np.abs(ax - bx), np.abs(ay - by)) >= ar + br + gap).all())


def _pick(rng: np.random.Generator, choices: tuple):
    return choices[int(rng.integers(len(choices)))]
