"""What a caption of the synthetic world asks for, as attributes that a clip can be checked against."""

from __future__ import annotations

import re

from lumos.data.worlds import BACKGROUNDS, COLOURS, DIRECTIONS, GROWTH, SHAPES, SIZES, VERBS, Scene
from lumos.errors import UserError

_OBJECT = re.compile(
    rf"(?:(?:an?|one|the)\s+)?"
    rf"(?:digit\s+(?P<digit>\d)|(?:(?P<size>{'|'.join(SIZES)})\s+)?(?:(?P<colour>{'|'.join(COLOURS)})\s+)?"
    rf"(?P<shape>{'|'.join(SHAPES)}))"
    rf"(?:\s+(?:(?:{'|'.join(VERBS)})\s+(?P<way>{'|'.join(DIRECTIONS)})"
    rf"|stays\s+(?P<still>still)|(?P<growth>{'|'.join(GROWTH)})))?"
)
_GROUND = re.compile(rf"^(.*?)(?:\s+on\s+an?\s+({'|'.join(BACKGROUNDS)})\s+background)?\s*\.?$")


def parse_caption(text: str) -> dict:
    """Attributes named by a caption: {"things": [{"colour", "shape", "digit", "size", "motion"}], "background"}.

    The inverse of the captions of `lumos.data.worlds`; what the caption leaves out is missing in the result.
    """
    plain = " ".join(text.lower().replace("grey", "gray").split())
    rest, ground = _GROUND.match(plain).groups()
    things = []
    for part in rest.split(" and "):
        match = _OBJECT.fullmatch(part)
        if match is None:
            raise UserError(
                f"caption {text!r} cannot be checked: write it like 'a small red circle moves left on a black "
                "background', 'a red plus grows and a white square stays still' or 'the digit 7 moves up'"
            )
        named = match.groupdict()
        motion = named["way"] or named["still"] or named["growth"]
        ask = {"colour": named["colour"], "shape": named["shape"], "size": named["size"], "motion": motion}
        if named["digit"] is not None:
            ask.update(shape="digit", digit=int(named["digit"]))
        things.append({key: value for key, value in ask.items() if value is not None})
    return {"things": things, **({"background": ground} if ground else {})}


def scene_attributes(scene: Scene) -> dict:
    """All attributes of a scene, in the form of `parse_caption`, also those that its caption leaves out."""
    things = []
    for thing in scene.things:
        ask = {"colour": thing.colour, "shape": thing.shape, "digit": thing.digit, "size": thing.size}
        if scene.num_frames > 1:
            ask["motion"] = thing.motion
        things.append({key: value for key, value in ask.items() if value not in (None, "")})
    return {"things": things, "background": scene.background}
