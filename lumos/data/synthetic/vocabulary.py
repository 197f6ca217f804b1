"""The words of captions of synthetic scenes, and the content of the scenes, by the options of `SyntheticScenes`."""

from __future__ import annotations

from lumos.data.synthetic import captions
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.data.synthetic.scene import (
    BACKGROUNDS,
    COLOURS,
    DIGIT_MOTIONS,
    DIRECTIONS,
    GRADIENTS,
    MOTIONS,
    SHAPES,
    SIZES,
    SOLIDS,
    SPRITE_MOTIONS,
)
from lumos.data.synthetic.sprites import SPRITES

DIGITS = tuple("0123456789")


def drawn_things(scenes: SyntheticScenes) -> dict[str, list[str]]:
    """Return what the scenes show, as lists by name: shapes, sizes, colors, digits, emoji, solids, backgrounds and motions."""
    kinds = drawn_kinds(scenes)
    motions = {"shapes": MOTIONS, "digits": DIGIT_MOTIONS, "sprites": SPRITE_MOTIONS}
    grounds = (*BACKGROUNDS, *(GRADIENTS if "sprites" in kinds else ()))
    found = {
        "shapes": SHAPES if "shapes" in kinds else (),
        "sizes": tuple(SIZES) if "shapes" in kinds else (),
        "colors": tuple(COLOURS) if {"shapes", "solids"} & kinds else (),
        "digits": DIGITS if "digits" in kinds else (),
        "emoji": SPRITES if "sprites" in kinds else (),
        "solids": SOLIDS if "solids" in kinds else (),
        "backgrounds": grounds,
        "motions": tuple(dict.fromkeys(motion for kind in kinds for motion in motions.get(kind, ()))),
    }
    return {name: sorted(values) for name, values in found.items() if values}


def drawn_kinds(scenes: SyntheticScenes) -> set[str]:
    """Return the kinds of scenes that are drawn: a kind whose share is 0 never is, unless no other kind is left."""
    left = [kind for kind in ("solids", "sprites", "digits", "shapes") if kind in scenes.kinds]
    shares = {"solids": scenes.share_solids, "sprites": scenes.share_sprites, "digits": scenes.share_digits}
    found = set()
    while left:
        kind = left.pop(0)
        share = shares[kind] if left else 1.0
        if share > 0:
            found.add(kind)
        if share == 1:
            break
    return found


def caption_words(scenes: SyntheticScenes) -> set[str]:
    """Return the words that captions of these scenes can have, for clips and for pictures."""
    kinds, things = drawn_kinds(scenes) - {"solids"}, drawn_things(scenes)
    if not kinds:
        return set()
    texts = set(captions.frames_of_captions(scenes.wording, named_background=scenes.share_background > 0))
    if scenes.share_background > 0:
        texts |= set(things["backgrounds"])
    if "shapes" in kinds:
        texts |= {"a", *things["shapes"], *things["colors"], *(things["sizes"] if scenes.share_size > 0 else ())}
    if "digits" in kinds:
        texts |= {"the digit", *things["digits"]}
    if "sprites" in kinds:
        texts |= {"a an", *things["emoji"]}
    motions = [motion for motion in things["motions"] if motion not in DIRECTIONS]
    texts |= set(captions.motion_phrases(scenes.wording, motions, tuple(DIRECTIONS)))
    if scenes.share_two > 0 and kinds & {"shapes", "sprites"}:
        texts.add("and")
        if "sprites" in kinds:
            moves = [motion for motion in SPRITE_MOTIONS if motion not in DIRECTIONS]
            texts |= {captions.plural(text) for text in captions.motion_phrases(scenes.wording, moves, tuple(DIRECTIONS))}
    return {word for text in texts for word in text.replace(",", " ").split()}
