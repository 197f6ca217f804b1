"""The prompts that the page, the README and the docs show can be drawn by the shipped model."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import pytest

from lumos import LumosPipeline
from lumos.commands.demo import EXAMPLES, own_examples
from lumos.data.trained_on import TrainedOn, read_trained_on
from lumos.demo import views
from lumos.errors import UserError
from lumos.evaluation.captions import parse_caption
from lumos.evaluation.checker import check_clip

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


@pytest.mark.parametrize("prompt", EXAMPLES)
def test_each_example_has_a_thumbnail_of_what_it_asks_for(prompt):
    frames = own_examples()[prompt]
    assert check_clip(frames, prompt)["all"], check_clip(frames, prompt)


def test_the_page_shows_a_button_with_each_thumbnail(micro_folder, tmp_path):
    gr = pytest.importorskip("gradio", reason="the demo needs the extra [demo]")
    from lumos.demo.limits import Limits
    from lumos.demo.page import build_page
    from lumos.demo.service import Service

    service = Service(LumosPipeline.from_pretrained(micro_folder), tmp_path / "root", Limits(), lambda prompt, seed: {})
    page = build_page(service, {**own_examples(), "<b>words</b>": None})
    service.worker.close()
    buttons = [block.value for block in page.blocks.values() if isinstance(block, gr.HTML) and "class=\"example\"" in block.value]
    assert len(buttons) == len(EXAMPLES)
    assert all(escape(prompt) in html and "data:image/webp" in html for prompt, html in zip(EXAMPLES, buttons, strict=True))
    filled = {fn.fn() for fn in page.fns.values() if getattr(fn.fn, "func", None) is str}
    assert filled == set(EXAMPLES)
    (table,) = (block for block in page.blocks.values() if isinstance(block, gr.Dataset))
    assert table.samples == [["<b>words</b>"]]
    assert "&lt;b&gt;" in views.example("<b>", own_examples()[EXAMPLES[0]], 8)


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
