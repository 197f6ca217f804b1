"""Attributes that the captions of synthetic scenes name, in the form in which a clip is checked for them.

A synthetic scene is one of `lumos.data.synthetic.sampling`: one or two objects that
stay, move, grow or shrink on a background.
"""

from __future__ import annotations

import re

from lumos.data.synthetic.captions import VERBS, base_form, noun
from lumos.data.synthetic.scene import BACKGROUNDS, COLOURS, DIRECTIONS, GRADIENTS, GROWTH, SHAPES, SIZES, Scene
from lumos.data.synthetic.sprites import SPRITES
from lumos.errors import UserError, shown

BASE_FORMS = tuple(map(base_form, VERBS))
_OBJECT = re.compile(
    rf"(?:(?:an?|one|the)\s+)?"
    rf"(?:(?P<sprite>{'|'.join(SPRITES)})|digit\s+(?P<digit>\d)|(?:(?P<size>{'|'.join(SIZES)})\s+)?(?:(?P<colour>{'|'.join(COLOURS)})\s+)?"
    rf"(?P<shape>{'|'.join(SHAPES)}))"
    rf"(?:\s+(?:(?:{'|'.join((*VERBS, *BASE_FORMS))})\s+(?P<way>{'|'.join(DIRECTIONS)})"
    rf"|stays?\s+(?P<still>still)|(?P<growth>{'|'.join(GROWTH)})))?"
)
_PLURAL = re.compile(rf"\s(?:{'|'.join(BASE_FORMS)}|stay)\s+\w+$")
_GROUND = re.compile(rf"^(.*?)(?:\s+on\s+an?\s+({'|'.join((*BACKGROUNDS, *GRADIENTS))})\s+background)?\s*\.?$")


def parse_caption(text: str) -> dict:
    """Return the attributes that a caption names.

    The result is {"objects": [{"colour", "shape", "digit", "sprite", "size", "motion"}],
    "background"}, with an entry in "objects" for each object. An attribute that the caption does not
    name is missing. UserError if the text does not have the form of the captions of
    `lumos.data.synthetic.captions`.
    """
    plain = " ".join(text.lower().replace("grey", "gray").split())
    rest, ground = _GROUND.match(plain).groups()
    objects = []
    for part in rest.split(" and "):
        match = _OBJECT.fullmatch(part)
        if match is None:
            raise UserError(
                f"caption {shown(text)} cannot be checked: write it like 'a small red circle moves left on a black "
                "background', 'a red plus grows and a white square stays still', 'the digit 7 moves up' or 'an owl and a "
                "car move right on a sky background'"
            )
        named = match.groupdict()
        motion = named["way"] or named["still"] or named["growth"]
        ask = {key: named[key] for key in ("colour", "shape", "sprite", "size")} | {"motion": motion}
        if named["digit"] is not None:
            ask.update(shape="digit", digit=int(named["digit"]))
        objects.append({key: value for key, value in ask.items() if value is not None})
    if _PLURAL.search(rest):  # "an apple and a banana move right": the motion belongs to all objects
        for obj in objects[:-1]:
            obj.setdefault("motion", objects[-1]["motion"])
    return {"objects": objects, **({"background": ground} if ground else {})}


def scene_attributes(scene: Scene) -> dict:
    """Return all attributes of a scene in the form of `parse_caption`, also those that its caption does not name."""
    objects = []
    for obj in scene.objects:
        shape = None if obj.sprite else obj.shape
        ask = {"colour": obj.colour, "shape": shape, "sprite": obj.sprite, "digit": obj.digit, "size": obj.size}
        if scene.num_frames > 1:
            ask["motion"] = obj.motion
        objects.append({key: value for key, value in ask.items() if value not in (None, "")})
    return {"objects": objects, "background": scene.background}


def named_attributes(scene: Scene) -> dict:
    """Return the attributes of a scene that its caption names, in the form of `parse_caption`.

    Unlike `parse_caption`, this function also works for paraphrased captions. Colours of digits are
    never named; sizes and the background are left out if the caption does not hold their words.
    """
    wanted = scene_attributes(scene)
    for obj, ask in zip(scene.objects, wanted["objects"], strict=True):
        if "digit" in ask:
            del ask["colour"]
        if "size" in ask and noun(obj, named_size=True) not in scene.caption:
            del ask["size"]
    if f" {scene.background}" not in scene.caption:
        del wanted["background"]
    return wanted
