"""An option of several generators: flags and columns allow all values that any of them allows, and each model checks its own."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from lumos import registry
from lumos.errors import UserError
from lumos.models.stiv.settings import StivOptions
from lumos.pipeline.options import SamplingOptions, add_flags, all_options, options_of
from lumos.settings import setting


@dataclass(frozen=True)
class Other(SamplingOptions):
    solver: str = setting("rk4", "solver of the other generator", choices=("rk4", "euler"))


@dataclass(frozen=True)
class Wrong(SamplingOptions):
    solver: int = setting(1, "order of the solver", low=1, high=4)


def generators(monkeypatch, **classes):
    found = {name: SimpleNamespace(load=lambda part, cls=cls: cls) for name, cls in classes.items()}
    monkeypatch.setattr(registry, "generators", lambda: found)


def test_choices_and_meanings_of_all_generators_are_offered(monkeypatch):
    generators(monkeypatch, stiv=StivOptions, other=Other)
    option = all_options()["solver"]
    assert option.choices == ("euler", "midpoint", "heun", "ab2", "rk4")
    own = options_of(StivOptions)["solver"]
    assert option.meaning == f"{own.meaning}; other: solver of the other generator"
    assert option.label == own.label
    parser = argparse.ArgumentParser()
    add_flags(parser, all_options())
    assert parser.parse_args(["--solver", "rk4"]).solver == "rk4"
    with pytest.raises(UserError, match="solver 'rk4' is not allowed"):
        StivOptions(solver="rk4")


def test_one_name_with_two_types_is_refused(monkeypatch):
    generators(monkeypatch, stiv=StivOptions, wrong=Wrong)
    with pytest.raises(TypeError, match="solver is a name and, in wrong, a whole number; give one of them another name"):
        all_options()
