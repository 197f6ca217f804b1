"""Names of model shapes (presets): alone, or after the name of their generator."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import toy_generator

from lumos import registry
from lumos.cli import main
from lumos.errors import UserError
from lumos.training.settings import build_settings


@pytest.fixture(autouse=True)
def three_generators(monkeypatch):
    """The generators lumos1 (the default), toy and toy-2; the toys have the presets tiny, swift and slow."""
    again = SimpleNamespace(GENERATOR=replace(toy_generator.GENERATOR, name="toy-2"))
    monkeypatch.setitem(sys.modules, "another_generator", again)
    monkeypatch.setattr(registry, "PACKAGES", ["lumos.models.lumos1", "toy_generator", "another_generator"])
    monkeypatch.setattr(toy_generator.ToyConfig, "presets", classmethod(lambda cls: ("tiny", "swift")))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("tiny", ("lumos1", "tiny")),
        ("3b", ("lumos1", "3b")),
        ("lumos1-0.5b", ("lumos1", "0.5b")),
        ("toy-tiny", ("toy", "tiny")),
        ("toy-swift", ("toy", "swift")),
        ("toy-2-swift", ("toy-2", "swift")),
    ],
)
def test_a_preset_is_found_by_its_name(text, found):
    generator, name = registry.find_preset(text)
    assert (generator.name, name) == found


def test_a_name_of_one_other_generator_needs_no_generator(monkeypatch):
    monkeypatch.setattr(registry, "PACKAGES", ["lumos.models.lumos1", "toy_generator"])
    assert registry.find_preset("swift")[0].name == "toy"


def test_a_name_of_several_other_generators_is_refused():
    with pytest.raises(UserError, match="preset 'swift' is one of several generators; give toy-swift or toy-2-swift"):
        registry.find_preset("swift")


@pytest.mark.parametrize("text", ["4b", "", "toy-", "toy-4b", "toy", "-tiny", "stiv-tiny", "LUMOS1-tiny"])
def test_an_unknown_preset_lists_names_that_work(text):
    with pytest.raises(UserError) as error:
        registry.find_preset(text)
    known = "tiny, 0.5b, 1b, 3b (lumos1), toy-tiny, toy-swift (toy), toy-2-tiny, toy-2-swift (toy-2)"
    assert str(error.value) == f"unknown preset {text!r}; known presets: {known}"


def test_plan_takes_a_preset_with_its_generator(capsys):
    assert main(["plan", "--generate", "--preset", "toy-tiny", "--peak-tflops", "1", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("toy-tiny: 1 parameters")
    for empty in (["--preset", ""], ["--model", "", "--preset", "3b"]):
        assert main(["plan", "--generate", *empty]) == 2


def test_a_training_takes_a_preset_with_its_generator():
    assert build_settings({"model": {"preset": "lumos1-tiny"}}) == build_settings({"model": {"preset": "tiny"}})
    assert build_settings({"generator": "toy", "model": {"preset": "toy-swift"}}).model.preset == "swift"
    with pytest.raises(UserError, match=r"model\.preset 'toy-swift' is one of the generator toy; set generator: toy"):
        build_settings({"model": {"preset": "toy-swift"}})
