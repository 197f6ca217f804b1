"""Captions of the small worlds: one plain way of saying what a scene shows, and others.

    plain     a small red circle moves left on a black background
    varied    on a black background, a small red circle is moving to the left
    unseen    a small red circle heads left against a black background       (ways that `varied` never takes)

Every way names the same attributes, so a model that was trained on `varied` can be asked with `unseen`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lumos.data.worlds import Thing

WORDINGS = ("plain", "varied", "unseen")
VERBS = ("moves", "slides", "goes")
VARIED_VERBS = (*VERBS, "travels", "drifts", "glides", "floats", "flies", "rolls", "creeps", "shifts", "walks")
VARIED_GERUNDS = ("drifting", "gliding", "floating", "flying", "rolling", "creeping", "walking")
UNSEEN_VERBS = ("heads", "wanders")
_PLAIN = {"still": ("stays still",), "grows": ("grows",), "shrinks": ("shrinks",)}
_VARIED = {
    "still": ("stays still", "does not move", "stands still"),
    "grows": ("grows", "gets bigger", "becomes larger", "keeps growing", "is getting bigger"),
    "shrinks": ("shrinks", "gets smaller", "becomes smaller", "keeps shrinking", "is getting smaller"),
}
_UNSEEN = {"still": ("is not moving",), "grows": ("is growing", "becomes bigger"), "shrinks": ("is shrinking",)}
_GROUNDS = {
    "plain": ("{0} on a {1} background",),
    "varied": ("{0} on a {1} background", "{0} over a {1} background", "on a {1} background, {0}", "{0} in front of {1}"),
    "unseen": ("{0} against a {1} background", "over a {1} background, {0}"),
}
_OPENINGS = {
    "plain": ("{}",),
    "varied": ("{}", "{}", "{}", "a video in which {}", "here {}"),
    "unseen": ("{}", "a clip in which {}"),
}
_PICTURE_OPENINGS = {
    "plain": ("{}",),
    "varied": ("{}", "{}", "{}", "a picture of {}", "here is {}"),
    "unseen": ("an image of {}", "this is {}"),
}
BASE_FORMS = {
    "moves": "move", "slides": "slide", "goes": "go", "travels": "travel", "drifts": "drift", "glides": "glide", "floats": "float",
    "flies": "fly", "rolls": "roll", "creeps": "creep", "shifts": "shift", "walks": "walk", "heads": "head", "wanders": "wander",
    "stays": "stay", "does": "do", "stands": "stand", "is": "are",
}  # fmt: skip


def caption(
    things: Sequence[Thing], background: str, rng: np.random.Generator, *, wording: str, moving: bool, share_size: float,
    share_background: float,
) -> str:  # fmt: skip
    """Say what a scene shows. Size and background are named in shares of the captions; a picture has no motion."""
    named = rng.random() < share_background
    named_sizes = rng.random(len(things)) < share_size
    if len(things) == 2 and things[0].shape == "sprite" and things[0].motion == things[1].motion:
        both = " and ".join(noun(thing, named_size=False) for thing in things)
        said = f"{both} {_plural(_motion(things[0].motion, rng, wording))}" if moving else both
    else:
        said = " and ".join(
            noun(thing, named_size) + (f" {_motion(thing.motion, rng, wording)}" if moving else "")
            for thing, named_size in zip(things, named_sizes, strict=True)
        )
    if named:
        said = _pick(rng, _GROUNDS[wording]).format(said, background)
    opening = _pick(rng, (_OPENINGS if moving else _PICTURE_OPENINGS)[wording])
    return said if said.startswith(("on ", "over ")) else opening.format(said)


def noun(thing: Thing, named_size: bool) -> str:
    """An object with its article: "a small red circle", "an owl", "the digit 7"."""
    if thing.shape == "digit":
        return f"the digit {thing.digit}"
    if thing.shape == "sprite":
        return f"{'an' if thing.sprite[0] in 'aeiou' else 'a'} {thing.sprite}"
    return f"a {thing.size + ' ' if named_size and thing.size else ''}{thing.colour} {thing.shape}"


def _motion(motion: str, rng: np.random.Generator, wording: str) -> str:
    standing = {"plain": _PLAIN, "varied": _VARIED, "unseen": _UNSEEN}[wording]
    if motion in standing:
        return _pick(rng, standing[motion])
    if wording == "plain":
        return f"{_pick(rng, VERBS)} {motion}"
    sideways = motion in ("left", "right")
    if wording == "varied":
        return _pick(
            rng,
            (
                f"{_pick(rng, VARIED_VERBS)} {motion}",
                f"is moving {motion}",
                f"is {_pick(rng, VARIED_GERUNDS)} {motion}",
                f"{_pick(rng, VARIED_VERBS)} to the {motion}" if sideways else f"{_pick(rng, VARIED_VERBS)} {motion}wards",
            ),
        )
    return _pick(
        rng,
        (
            f"{_pick(rng, UNSEEN_VERBS)} {motion}",
            f"is sliding {motion}" if sideways else f"is going {motion}",
            f"is moving to the {motion}" if sideways else f"is moving {motion}wards",
        ),
    )


def _plural(motion: str) -> str:
    verb, _, rest = motion.partition(" ")
    return f"{BASE_FORMS[verb]} {rest}"


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
