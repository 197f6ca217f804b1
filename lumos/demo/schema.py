"""The JSON Schema of requests and answers of the HTTP API, derived from the declarations of the options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lumos.demo.limits import Limits
from lumos.demo.worker import ENDED
from lumos.errors import UserError, instead, shown
from lumos.pipeline.base import VideoPipeline
from lumos.pipeline.defaults import CLIP_LIMITS
from lumos.pipeline.inputs import MAX_SEED
from lumos.pipeline.options import CHOICE, FLAG, INTERVAL, NUMBER, WHOLE, Option
from lumos.settings import is_number, is_whole

HOLDS = {
    "string": ("text", lambda value: isinstance(value, str)),
    "integer": ("a whole number", is_whole),
    "number": ("a number", is_number),
    "boolean": ("true or false", lambda value: isinstance(value, bool)),
    "array": ("a list", lambda value: isinstance(value, list)),
}
"""The name in messages, and the check, of each type of JSON that a field of a request may have."""
_TYPES = {WHOLE: "integer", NUMBER: "number", FLAG: "boolean", INTERVAL: "array", CHOICE: "string"}


def request_schema(pipe: VideoPipeline, limits: Limits) -> dict[str, Any]:
    """Return the schema of a request for one clip: what the generator takes, within the limits of the server."""
    text = {"type": "string", "maxLength": limits.max_prompt_length}
    side = {"type": "integer", "minimum": pipe.size_unit, "maximum": limits.max_side, "multipleOf": pipe.size_unit}
    whole, file = {"type": "integer", "minimum": 1}, {"type": "string", "contentEncoding": "base64"}
    own, takes = pipe.clip, pipe.takes
    fields: dict[str, dict[str, Any]] = {
        "prompt": {**text, "description": "what the clip shows"},
        "negative_prompt": {**text, "description": "what the clip must not show"},
        "num_frames": {**whole, "maximum": limits.max_frames, "default": own.num_frames,
                       "description": f"frames, given frames included: 1, or 1 + a multiple of {pipe.temporal_compression}"},
        "height": {**side, "default": own.height, "description": "pixels"},
        "width": {**side, "default": own.width, "description": "pixels"},
        "fps": {**whole, "maximum": CLIP_LIMITS["fps"], "default": own.fps, "description": "frames per second"},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED, "description": "default: random"},
        "image": {**file, "description": "a picture that becomes the first frame: a data: URL, or the file in base64"},
        "video": {**file, "description": "a clip that the new one continues: a data: URL, or the file in base64"},
    }  # fmt: skip
    if "last_image" in takes:
        fields["last_image"] = {**file, "description": "a picture that becomes the last frame"}
    if "interpolate" in takes:
        fields["interpolate"] = {**whole, "description": "the factor by which the frame rate of the video is raised"}
    if "views" in takes:
        fields["views"] = {"type": "boolean", "description": "true: views of the object in the image from all sides"}
    fields |= {option.name: option_schema(option, getattr(pipe.settings, option.name), limits)
               for option in pipe.sampling.declared().values()}  # fmt: skip
    nullable = {name: {**found, "type": [found["type"], "null"]} for name, found in fields.items()}
    required = [] if {"interpolate", "views"} & set(takes) else ["prompt"]
    if required:
        nullable["prompt"] = {**fields["prompt"], "minLength": 1}
    return {"type": "object", "properties": nullable, "required": required, "additionalProperties": False}


def option_schema(option: Option, own: Any, limits: Limits) -> dict[str, Any]:
    """Return the schema of a sampling option; `own` is the default of the model."""
    names = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}
    bounds = {names[name]: option.metadata[name] for name in names if option.metadata.get(name) is not None}
    if option.name.endswith("steps"):
        bounds["maximum"] = min(limits.max_steps, bounds.get("maximum", limits.max_steps))
    found: dict[str, Any] = {"type": _TYPES[option.kind], "description": option.meaning}
    if option.kind == INTERVAL:
        found |= {"items": {"type": "number", **bounds}, "minItems": 2, "maxItems": 2}
    elif option.kind == CHOICE:
        found |= {"enum": [*option.choices, None]}
    elif option.kind != FLAG:
        found |= bounds
    return found if own is None else {**found, "default": list(own) if isinstance(own, tuple) else own}


def check_types(values: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Raise UserError for a field that the schema does not have or of another type.

    The ranges are checked where those of a form are.
    """
    fields = schema["properties"]
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"unknown field {shown(name)}{instead(name, fields, 'known are')}")
        words, holds = HOLDS[type_of(fields[name])]
        if not holds(value):
            raise UserError(f"{name} {shown(value, 60)} is not allowed; give {words}")


def type_of(field: Mapping[str, Any]) -> str:
    """Return the type of JSON that a field has if it is not null."""
    return field["type"] if isinstance(field["type"], str) else field["type"][0]


def with_whole_numbers(values: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with 5 in place of 5.0 for fields of whole numbers: both are the same number in JSON Schema."""
    wholes = {name for name, field in schema["properties"].items() if type_of(field) == "integer"}
    return {name: int(value) if name in wholes and isinstance(value, float) and value.is_integer() else value
            for name, value in values.items()}  # fmt: skip


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _or_null(kind: str, description: str, **more: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], "description": description, **more}


ERROR = _object(error={"type": "string", "description": "what was given, what is allowed, what to do"})
CLIP = _object(
    id={"type": "string"},
    status={"enum": ["waiting", "working", *ENDED]},
    progress={"type": "number", "minimum": 0, "maximum": 1, "description": "share of all steps that are done"},
    ahead={"type": "integer", "description": "clips that are made before this one"},
    frames={"type": "integer", "description": "frames that are made so far"},
    prompt={"type": "string"},
    created={"type": "string", "format": "date-time"},
    seed=_or_null("integer", "the seed; null while it is not known"),
    seconds=_or_null("number", "seconds that the clip took, without waiting"),
    notes={"type": "array", "items": {"type": "string"}, "description": "warnings, for example of options without effect"},
    error=_or_null("string", "why a clip has failed or was interrupted"),
    content=_or_null("string", "address of the mp4 or png file of a clip that is done"),
    record=_or_null("string", "address of the JSON file with all settings of a clip that is done"),
)
CLIPS = _object(clips={"type": "array", "items": CLIP}, next=_or_null("string", "the value of `before` for the next page"))
