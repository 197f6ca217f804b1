"""Captions and prompts that look alike are one text to a model, in training and in generation."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from lumos import VideoPipeline
from lumos.data.ingest.item import BAD_CAPTION, NO_CAPTION
from lumos.data.ingest.manifest import items
from lumos.errors import UserError
from lumos.pipeline.inputs import check_prompt
from lumos.pipeline.request import Request
from lumos.prompt_lists.clips import default_name
from lumos.prompt_lists.rows import read_rows
from lumos.wording import is_blank, one_line

ALIKE = [
    " a  red\ncircle ", "a red\u00a0circle\r\n", "\ufeffa red circle", "a red\u200b cir\u00adcle", "\u202aa red circle\u202c\u200e",
    "a\tred\u2028circle", "a red\u3000circle\u2060",
]  # fmt: skip
BLANK = ["", " \n\t", "\u200b", "\ufeff", "\u200d\u2060", "\u3164", "\u2800", "\ufe0f", "\u0301"]
WRONG = ["a \x1b[31mred circle", "a\x7f cat", "a cat\0", "a caf\ufffd", "a cat\uffff", "\ufffea cat", "a \ud83d cat", "a\x9bcat"]


@pytest.mark.parametrize("text", ALIKE)
def test_texts_that_look_alike_are_one(tmp_path, text):
    assert one_line(text) == check_prompt(text) == "a red circle"
    assert default_name(text, False) == "a-red-circle.mp4"
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    assert [item.caption for item in items([tmp_path])] == ["a red circle"]


def test_marks_that_join_letters_and_emoji_stay():
    for text in ("می\u200cروم", "👩\u200d🔬", "🏴\U000e0067\U000e0062\U000e007f", "❤\ufe0f", "क्\u200dष"):
        assert one_line(text) == text
        assert not is_blank(text)
    assert one_line(unicodedata.normalize("NFD", "grün, 각")) == "grün, 각"


@pytest.mark.parametrize("text", BLANK)
def test_texts_that_show_nothing_are_empty(tmp_path, text):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert [item.problem[0] for item in items([tmp_path])] == [NO_CAPTION]
    with pytest.raises(UserError, match="the prompt is empty"):
        check_prompt(text)
    assert Request("a cat", negative_prompt=[text]).negative_prompt == [None]
    (tmp_path / "list.txt").write_text(f"{text}\na cat\n", encoding="utf-8")
    assert [row.options["prompt"] for row in read_rows(tmp_path / "list.txt")] == ["a cat"]


@pytest.mark.parametrize("text", WRONG)
def test_characters_of_no_caption_are_refused_in_prompts(tmp_path, text):
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert [item.problem[0] for item in items([tmp_path])] == [BAD_CAPTION]
    with pytest.raises(UserError, match=r"has U\+[0-9A-F]{4}, "):
        check_prompt(text)


def test_clips_of_prompts_that_look_alike_are_one(micro_folder: Path):
    pipe = VideoPipeline.from_pretrained(micro_folder, device="cpu")
    made = pipe([*ALIKE, "a red circle"], seed=[3] * (len(ALIKE) + 1), negative_prompt=["a  cat\n"] * len(ALIKE) + ["a cat"],
                num_frames=1, output_type="latent")  # fmt: skip
    assert all((clip == made.latents[-1]).all() for clip in made.latents)
