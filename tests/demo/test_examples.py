"""The prompts that the page, the README and the docs show can be drawn by the shipped model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lumos.commands.demo import EXAMPLES
from lumos.data.trained_on import TrainedOn, read_trained_on
from lumos.demo import views
from lumos.errors import UserError
from lumos.evaluation.captions import parse_caption

PAGES = ("README.md", "docs/demo.md", "docs/generate/index.md", "docs/generate/long-clips.md", "integrations/comfyui/README.md")
NAMED = {"shape": "shapes", "colour": "colors", "size": "sizes", "digit": "digits", "sprite": "emoji", "motion": "motions"}


def problem(prompt: str, known: TrainedOn) -> str | None:
    """Return why a prompt cannot be drawn: a word that no caption had, or an attribute that no scene had."""
    if unknown := known.unknown_words(prompt):
        return f"unknown words {unknown}"
    try:
        asked = parse_caption(prompt)
    except UserError as error:
        return str(error)
    named = [(NAMED[key], str(value)) for thing in asked["objects"] for key, value in thing.items() if value != "digit"]
    named += [("backgrounds", asked["background"])] if "background" in asked else []
    return next((f"no {name} {value}" for name, value in named if value not in known.lists[name]), None)


@pytest.fixture(params=["lumos-tiny", "stiv-tiny"])
def known(request, repo: Path) -> TrainedOn:
    return read_trained_on(repo / "checkpoints" / request.param)


def test_the_examples_of_the_page_can_be_drawn(known):
    assert {prompt: problem(prompt, known) for prompt in EXAMPLES} == dict.fromkeys(EXAMPLES)
    things = [parse_caption(prompt)["objects"] for prompt in EXAMPLES]
    assert any("sprite" in thing for objects in things for thing in objects)
    assert any(len(objects) == 2 for objects in things)


def test_an_example_that_cannot_be_drawn_is_found(known):
    assert problem("a small yellow circle moves right on a white background", known)
    assert problem("a purple hexagon spins", known)


@pytest.mark.parametrize("page", PAGES)
def test_the_prompts_of_the_docs_can_be_drawn(page, repo: Path, known):
    text = (repo / page).read_text()
    prompts = re.findall(r'--prompt "([^".]+)"|prompt="([^".]+)"|pipe\("([^".]+)"|"prompt": "([^".]+)"', text)
    said = [next(filter(None, found)) for found in prompts]
    assert said or page.startswith("integrations")
    assert {prompt: problem(prompt, known) for prompt in said} == dict.fromkeys(said)


def test_the_card_lists_what_the_model_knows(repo: Path, known):
    for name in ("lumos-tiny", "stiv-tiny"):
        card = (repo / "checkpoints" / name / "README.md").read_text()
        assert all(f"| {name} | {', '.join(values)} |" in card for name, values in known.lists.items())


def test_the_page_shows_what_the_model_knows(known):
    html = views.known(known)
    assert "owl" in html
    assert "navy" in html
    assert "&lt;b&gt;" in views.known(TrainedOn(frozenset({"<b>"})))
