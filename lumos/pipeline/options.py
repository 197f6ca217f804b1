"""Sampling options: each generator declares its own once, and everything else about them is derived here.

A generator declares a frozen dataclass that inherits from `SamplingOptions`. Each field is a
`lumos.settings.setting`:

    num_inference_steps: int = setting(50, "parallel decoding steps of each latent frame", low=1, high=1000, step=1)

The type is int, float, bool, tuple[float, float] or str, or one of these with `| None`; a str is one
of the metadata's choices. The metadata are:

    meaning              what the option does, in one line: the help of its flag
    low, high            inclusive bounds
    above, below         exclusive bounds
    choices              the allowed names of a str
    allowed              the allowed range in words, for messages
    step                 step of a number's slider in the page (a field, if it may be None) and of its input in ComfyUI; without it
                         there is neither
    slider_high          the largest value of the slider, if it is less than `high`
    label                the label of the slider, if the option's name and meaning would be too long
    pictures             False: the option has no effect on a single picture
    given                True: the option has an effect only on clips that begin with given frames
    trade                True: the option saves time or memory and changes the result
    cost                 True: the option changes the time or the memory of a clip in another way, so that `plan` needs it

`options_of` is the source of the command line flags, the columns of prompt lists, the fields of the
HTTP API, the controls of the page, the inputs of the ComfyUI nodes and the options of `plan`.
"""

from __future__ import annotations

import argparse
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Self

from lumos import registry
from lumos.errors import UserError, instead, shown
from lumos.settings import is_number, is_whole, setting

WHOLE, NUMBER, FLAG, INTERVAL, CHOICE = "a whole number", "a number", "true or false", "two numbers", "a name"
ACCELERATION = ("int8", "compile")
"""Arguments of `from_pretrained` that make the network smaller or faster."""
_KINDS = {int: WHOLE, float: NUMBER, bool: FLAG, str: CHOICE}


@dataclass(frozen=True)
class Option:
    """A sampling option with its declaration. `kind` is WHOLE, NUMBER, FLAG, INTERVAL or CHOICE."""

    name: str
    kind: str
    is_optional: bool  # None is allowed and switches the option off
    default: Any
    metadata: Mapping[str, Any]

    @property
    def meaning(self) -> str:
        return self.metadata["meaning"]

    @property
    def label(self) -> str:
        """The label of the option's control in the page."""
        return self.metadata.get("label") or f"{self.name.replace('_', ' ').capitalize()}: {self.meaning}"

    @property
    def step(self) -> float | None:
        return self.metadata.get("step")

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed names of an option of the kind CHOICE."""
        return self.metadata["choices"]

    @property
    def has_control(self) -> bool:
        """Whether the option has a control in the page and an input in ComfyUI: numbers with a step, flags and choices."""
        return self.step is not None or self.kind in (FLAG, CHOICE)

    @property
    def for_pictures(self) -> bool:
        return self.metadata.get("pictures", True)

    @property
    def for_given_frames(self) -> bool:
        return self.metadata.get("given", False)

    @property
    def is_trade(self) -> bool:
        return self.metadata.get("trade", False)

    @property
    def affects_cost(self) -> bool:
        return self.is_trade or self.metadata.get("cost", False)

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def slider(self) -> tuple[float, float, float] | None:
        """The (lowest value, highest value, step) of the slider; None for an option without a slider."""
        if self.step is None:
            return None
        low, above = self.metadata["low"], self.metadata["above"]
        return above + self.step if low is None else low, self.metadata.get("slider_high") or self.most, self.step

    @property
    def most(self) -> float:
        """The largest value of an option with a step."""
        high, below = self.metadata["high"], self.metadata["below"]
        return below - self.step if high is None else high

    @property
    def allowed(self) -> str:
        """The allowed range in words."""
        if self.metadata["allowed"]:
            return self.metadata["allowed"]
        if self.kind == CHOICE:
            return ", ".join(self.choices)
        low, high, above, below = (self.metadata[name] for name in ("low", "high", "above", "below"))
        if low is None and above is None:
            return self.kind
        if low is not None:
            end = f" to {high}" if high is not None else f" to below {below}" if below is not None else ""
            return f"{low}{end}" if end else f"at least {low}"
        end = f", at most {high}" if high is not None else f", less than {below}" if below is not None else ""
        return f"more than {above}{end}"

    def check(self, value: Any) -> Any:
        """Return the value, a pair as a tuple of floats; UserError for a wrong type and for a value out of range."""
        if value is None and self.is_optional:
            return None
        if self.kind == INTERVAL:
            pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))
            if not (pair and all(map(self._in_range, value)) and value[0] < value[1]):
                raise self._refused(value, self.allowed)
            return tuple(map(float, value))
        if self.kind == CHOICE:
            if not isinstance(value, str) or value not in self.choices:
                raise self._refused(value, self.allowed)
            return value
        holds = {WHOLE: is_whole, NUMBER: is_number, FLAG: lambda v: isinstance(v, bool)}[self.kind]
        if not holds(value):
            raise self._refused(value, self.kind)
        if self.kind != FLAG and not self._in_range(value):
            raise self._refused(value, self.allowed)
        return value

    def parse(self, text: str) -> Any:
        """Return the value of the text of a table's cell or a form's field; ValueError if the text cannot be parsed."""
        text = text.strip()
        if self.kind == FLAG:
            return parsed_flag(text)
        if self.kind == INTERVAL:
            return [float(part) for part in text.split()]
        if self.kind == CHOICE:
            return text
        return int(text) if self.kind == WHOLE else float(text)

    def holds(self, value: Any) -> bool:
        """Return whether the value has the option's type. The range is not checked."""
        if self.kind == INTERVAL:
            return isinstance(value, list | tuple) and len(value) == 2
        kinds = {WHOLE: is_whole, NUMBER: is_number, FLAG: lambda v: isinstance(v, bool), CHOICE: lambda v: isinstance(v, str)}
        return kinds[self.kind](value)

    def _in_range(self, value: float) -> bool:
        low, high, above, below = (self.metadata[name] for name in ("low", "high", "above", "below"))
        return (isinstance(value, int) or math.isfinite(value)) and (  # an int may be too large for a float
            (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and (below is None or value < below)
        )

    def _refused(self, value: Any, allowed: str) -> UserError:
        return UserError(f"{self.name} {shown(value)} is not allowed; give {allowed}")


@dataclass(frozen=True)
class SamplingOptions:
    """The base class of the sampling options of a generator.

    UserError for a wrong type and for a value out of range.
    """

    num_inference_steps: int = setting(50, "steps of the sampler", low=1, high=1000, step=1, cost=True)

    def __post_init__(self) -> None:
        for option in options_of(type(self)).values():
            object.__setattr__(self, option.name, option.check(getattr(self, option.name)))
        self.check_combinations()

    @classmethod
    def declared(cls) -> dict[str, Option]:
        """Return the options by name, in the order of their declaration."""
        return options_of(cls)

    def check_combinations(self) -> None:
        """Raise UserError for values that are allowed alone but not together.

        A generator may override this method.
        """

    def steps_of(self, frame: int) -> int:
        """Return the most steps of a new latent frame; `frame` is its number among the new ones, from 0."""
        return self.num_inference_steps

    def steps_before(self, frame: int) -> int:
        """Return the most steps of all the new latent frames before latent frame number `frame`."""
        return sum(map(self.steps_of, range(frame)))

    def changed(self, **given: Any) -> Self:
        """Return a copy in which the arguments that are not None replace fields."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


def parsed_flag(text: str) -> bool:
    """Return True for "true" and False for "false", in any case; ValueError for other texts."""
    found = {"true": True, "false": False}.get(text.strip().lower())
    if found is None:
        raise ValueError(text)
    return found


def all_options() -> dict[str, Option]:
    """Return the options of all generators by name, for flags and columns that are needed before a model is loaded.

    An option of several generators has the meanings of all and the choices of all; the model checks a value once it is
    loaded. Raises TypeError if generators declare one name with different types.
    """
    found: dict[str, Option] = {}
    for name, generator in registry.generators().items():
        for option in options_of(generator.load("sampling")).values():
            found[option.name] = joined(found[option.name], option, name) if option.name in found else option
    return found


@cache
def options_of(cls: type[SamplingOptions]) -> dict[str, Option]:
    """Return the options that a class declares, by name, in order."""
    hints, found = typing.get_type_hints(cls), {}
    for field in fields(cls):
        kind, is_optional = _kind_of(hints[field.name], field.name)
        found[field.name] = Option(field.name, kind, is_optional, field.default, field.metadata)
    return found


def joined(option: Option, other: Option, generator: str) -> Option:
    """Return an option that stands for both declarations of one name; `other` is that of `generator`."""
    if option.kind != other.kind:
        raise TypeError(
            f"the sampling option {option.name} is {option.kind} and, in {generator}, {other.kind}; give one of them another name"
        )
    metadata = dict(option.metadata)
    if other.meaning != option.meaning:
        metadata["meaning"] = f"{option.meaning}; {generator}: {other.meaning}"
        metadata["label"] = metadata.get("label") or option.label
    if option.kind == CHOICE:
        metadata["choices"] = tuple(dict.fromkeys((*option.choices, *other.choices)))
    return replace(option, metadata=types.MappingProxyType(metadata))


def _kind_of(hint: Any, name: str) -> tuple[str, bool]:
    """Return (kind, whether None is allowed) of a type annotation."""
    arguments = typing.get_args(hint)
    is_optional = typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in arguments
    if is_optional:
        (hint,) = (argument for argument in arguments if argument is not type(None))
    if typing.get_origin(hint) is tuple and typing.get_args(hint) == (float, float):
        return INTERVAL, is_optional
    if hint not in _KINDS:
        allowed = "int, float, bool, str, tuple[float, float], or these | None"
        raise TypeError(f"the sampling option {name} is a {hint}; allowed: {allowed}")
    return _KINDS[hint], is_optional


def add_flags(
    parser: argparse.ArgumentParser, options: Mapping[str, Option], *, pictures: bool = False, given: bool = True
) -> None:
    """Add a flag for each option, with None as its default.

    pictures: leave out the options that have no effect on a single picture. given: include the
    options that have an effect only on clips that begin with given frames.
    """
    for option in options.values():
        if (pictures and not option.for_pictures) or (option.for_given_frames and not given):
            continue
        if option.kind == FLAG:
            parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, default=None, help=option.meaning)
        elif option.kind == CHOICE:
            parser.add_argument(option.flag, choices=option.choices, help=option.meaning)
        elif option.kind == INTERVAL:
            parser.add_argument(option.flag, type=float, nargs=2, metavar=("START", "STOP"), help=option.meaning)
        else:
            parser.add_argument(option.flag, type=int if option.kind == WHOLE else float, help=option.meaning)


def given_options(values: Any, names: Collection[str]) -> dict[str, Any]:
    """Return the attributes of an argparse namespace that have one of these names and are not None."""
    return {name: value for name in names if (value := getattr(values, name, None)) is not None}


def check_names(given: Collection[str], cls: type[SamplingOptions], generator: str) -> None:
    """Raise UserError for an option that this generator does not have."""
    known = options_of(cls)
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"{unknown[0]} is no sampling option of {generator}{instead(unknown[0], known)}")


def add_acceleration(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each argument in ACCELERATION."""
    add = parser.add_argument
    add("--int8", action="store_true", help="int8 weights for the decoder's linear layers: a quarter of the memory (extra [int8])")
    add("--compile", action="store_true", help="use torch.compile for norms and MLPs; the first clip waits for the compiler")
