"""Captions of synthetic scenes in three wordings, for example:

    plain     a small red circle moves left on a black background
    varied    on a black background, a small red circle is moving to the left
    unseen    a small red circle heads left against a black background

No caption of the wording `unseen` is phrased as one of `varied`. All wordings name the same
attributes, so a model that was trained on `varied` can be tested with prompts in the wording `unseen`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lumos.data.synthetic.scene import SceneObject

WORDINGS = ("plain", "varied", "unseen")
VERBS = ("moves", "slides", "goes")
VARIED_VERBS = (
    "advances", "ambles", "bounces", "climbs", "coasts", "crawls", "creeps", "cruises", "dances", "darts", "dashes", "drifts",
    "drives", "flies", "floats", "flows", "glides", "hurries", "inches", "jumps", "leaps", "marches", "paces", "passes",
    "proceeds", "pushes", "races", "rides", "roams", "rolls", "rushes", "sails", "saunters", "scoots", "scurries", "shifts",
    "shoots", "soars", "speeds", "steers", "strays", "streams", "strolls", "sweeps", "swings", "travels", "tumbles", "veers",
    "walks", "zooms",
)  # fmt: skip
"""Many verbs, so that a model learns the direction from its own word and not from the verb."""
SHARE_VERBS = 0.4
"""Share of VERBS among the verbs of the wording `varied`; the others are from VARIED_VERBS."""
UNSEEN_VERBS = ("heads", "wanders")
_PLAIN = {"still": ("stays still",), "grows": ("grows",), "shrinks": ("shrinks",)}
_VARIED = {
    "still": ("stays still", "does not move", "stands still", "remains still", "stays in place", "holds still", "rests",
              "is still"),
    "grows": ("grows", "gets bigger", "becomes larger", "keeps growing", "is getting bigger", "gets larger", "expands", "swells",
              "is expanding", "is swelling", "is becoming larger"),
    "shrinks": ("shrinks", "gets smaller", "becomes smaller", "keeps shrinking", "is getting smaller", "contracts", "diminishes",
                "is contracting", "is diminishing", "is becoming smaller"),
}  # fmt: skip
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


def caption(
    objects: Sequence[SceneObject], background: str, rng: np.random.Generator, *, wording: str, moving: bool, share_size: float,
    share_background: float,
) -> str:  # fmt: skip
    """Return a caption of a scene with these objects and this background.

    The caption names the size of an object with probability `share_size` and the background with
    probability `share_background`. It names motions if `moving` is true, which it is not for pictures.
    """
    named = rng.random() < share_background
    named_sizes = rng.random(len(objects)) < share_size
    if len(objects) == 2 and objects[0].shape == "sprite" and objects[0].motion == objects[1].motion:
        both = " and ".join(noun(obj, named_size=False) for obj in objects)
        said = f"{both} {plural(_motion(objects[0].motion, rng, wording))}" if moving else both
    else:
        said = " and ".join(
            noun(obj, named_size) + (f" {_motion(obj.motion, rng, wording)}" if moving else "")
            for obj, named_size in zip(objects, named_sizes, strict=True)
        )
    if named:
        said = _pick(rng, _GROUNDS[wording]).format(said, background)
    opening = _pick(rng, (_OPENINGS if moving else _PICTURE_OPENINGS)[wording])
    return said if said.startswith(("on ", "over ")) else opening.format(said)


def noun(obj: SceneObject, named_size: bool) -> str:
    """Return an object with its article, for example "a small red circle", "an owl" or "the digit 7"."""
    if obj.shape == "digit":
        return f"the digit {obj.digit}"
    if obj.shape == "sprite":
        return f"{'an' if obj.sprite[0] in 'aeiou' else 'a'} {obj.sprite}"
    return f"a {obj.size + ' ' if named_size and obj.size else ''}{obj.colour} {obj.shape}"


def _motion(motion: str, rng: np.random.Generator, wording: str) -> str:
    standing = {"plain": _PLAIN, "varied": _VARIED, "unseen": _UNSEEN}[wording]
    if motion in standing:
        return _pick(rng, standing[motion])
    if wording == "plain":
        return f"{_pick(rng, VERBS)} {motion}"
    sideways = motion in ("left", "right")
    if wording == "varied":
        verb = _pick(rng, VERBS if rng.random() < SHARE_VERBS else VARIED_VERBS)
        return _pick(
            rng,
            (
                f"{verb} {motion}",
                f"is moving {motion}",
                f"is {gerund(_pick(rng, VARIED_VERBS))} {motion}",
                f"{verb} to the {motion}" if sideways else f"{verb} {motion}wards",
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


def base_form(verb: str) -> str:
    """Return the plural of a verb of these captions: "fly" for "flies", "march" for "marches", "are" for "is"."""
    if verb == "is":
        return "are"
    if verb.endswith("ies"):
        return verb.removesuffix("ies") + "y"
    return verb[: -2 if verb.endswith(("ches", "shes", "sses", "oes")) else -1]


def gerund(verb: str) -> str:
    """Return the gerund of a verb of VARIED_VERBS, for example "gliding" for "glides".

    No verb of VARIED_VERBS doubles its last letter in the gerund.
    """
    return base_form(verb).removesuffix("e") + "ing"


def plural(motion: str) -> str:
    """Return the phrase of a motion for two objects: "fly to the left" for "flies to the left"."""
    verb, space, rest = motion.partition(" ")
    return f"{base_form(verb)}{space}{rest}"


def motion_phrases(wording: str, motions: Iterable[str], directions: Iterable[str]) -> Iterator[str]:
    """Yield all phrases of these motions in a wording: `motions` are still, grows and shrinks; `directions` are moved in."""
    for motion in motions:
        yield from {"plain": _PLAIN, "varied": _VARIED, "unseen": _UNSEEN}[wording][motion]
    for direction in directions:
        sideways = direction in ("left", "right")
        verbs = {"plain": VERBS, "varied": (*VERBS, *VARIED_VERBS), "unseen": UNSEEN_VERBS}[wording]
        yield from (f"{verb} {direction}" for verb in verbs)
        if wording == "plain":
            continue
        far = f"to the {direction}" if sideways else f"{direction}wards"
        if wording == "varied":
            yield from (f"{verb} {far}" for verb in verbs)
            yield from (f"is {doing} {direction}" for doing in ("moving", *map(gerund, VARIED_VERBS)))
        else:
            yield from (f"is sliding {direction}" if sideways else f"is going {direction}", f"is moving {far}")


def frames_of_captions(wording: str, named_background: bool) -> Iterator[str]:
    """Yield the words around the objects of captions in a wording, of clips and of pictures."""
    templates = [*_OPENINGS[wording], *_PICTURE_OPENINGS[wording], *(_GROUNDS[wording] if named_background else ())]
    yield from (re.sub(r"{\d?}", " ", template) for template in templates)


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
