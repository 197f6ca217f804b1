"""The record of the training data of a model: words, file, and the note on words that no caption had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumos.data import trained_on as module
from lumos.data.trained_on import TrainedOn, read_trained_on, trained_on_of, words_of, write_trained_on
from lumos.errors import UserError

KNOWN = TrainedOn.of(["A red circle moves left.", "the digit 7, on a sky background"], {"shapes": ["circle"]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A Red, red CIRCLE!", ["a", "red", "circle"]),
        ("the zig-zag of a dog's 7 toys", ["the", "zig-zag", "of", "a", "dog's", "7", "toys"]),
        ("snake_case", ["snake", "case"]),
        ("Ein Käfer läuft", ["ein", "käfer", "läuft"]),
        ("Ein Ka\u0308fer", ["ein", "käfer"]),
        ("红色圆 moves", ["红", "色", "圆", "moves"]),
        ("  ", []),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


@given(st.lists(st.text(), max_size=6), st.text())
def test_words_of_captions_are_known_and_others_are_not(captions, prompt):
    known = TrainedOn.of(captions)
    said = {word for caption in captions for word in words_of(caption)}
    assert known.words == said
    assert known.unknown_words(prompt) == ([word for word in words_of(prompt) if word not in said] if said else [])


def test_the_note_names_the_words_once_in_order():
    assert KNOWN.note(["a red circle moves left", "THE DIGIT 7"]) is None
    note = KNOWN.note(["a purple hexagon spins", "purple rain"])
    assert "'purple', 'hexagon', 'spins', 'rain'" in note
    assert "\n" not in note
    long = KNOWN.note(["one two three four five six seven eight"])
    assert "'five' and 3 more" in long
    assert "six" not in long


def test_a_list_that_is_not_complete_gives_no_note(monkeypatch):
    monkeypatch.setattr(module, "MAX_WORDS", 3)
    most = TrainedOn.of(["one two three four"])
    assert (len(most.words), most.is_complete) == (3, False)
    assert most.note(["five"]) is None
    assert TrainedOn.of([]).note(["five"]) is None


def test_a_continued_training_knows_both():
    base = TrainedOn(frozenset({"owl"}), True, {"emoji": ["owl"], "shapes": ["plus"]}, 30.0)
    both = KNOWN.joined(base)
    assert {"owl", "red"} <= both.words
    assert both.lists == {"emoji": ["owl"], "shapes": ["circle", "plus"]}
    assert (both.is_complete, both.picture_psnr) == (True, 30.0)
    assert not KNOWN.joined(None).is_complete  # the training data of that base model are not known


def test_the_file_is_read_back(tmp_path: Path):
    assert read_trained_on(tmp_path) is None
    write_trained_on(tmp_path, None)
    assert not list(tmp_path.iterdir())
    write_trained_on(tmp_path, KNOWN)
    assert read_trained_on(tmp_path) == KNOWN
    (tmp_path / "adapter").mkdir()
    assert not trained_on_of(tmp_path, tmp_path / "adapter").is_complete
    write_trained_on(tmp_path / "adapter", TrainedOn.of(["a dog"]))
    assert "dog" in trained_on_of(tmp_path, tmp_path / "adapter").words


@pytest.mark.parametrize(
    "change", [{"words": 3}, {"words": [3]}, {"words_are_complete": None}, {"shapes": "circle"}, {"picture_psnr": "high"}]
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, change):
    file = tmp_path / "trained_on.json"
    file.write_text(json.dumps({**KNOWN.as_json(), **change}))
    with pytest.raises(UserError, match=r"trained_on\.json is damaged"):
        read_trained_on(tmp_path)


def test_vowel_marks_belong_to_their_words():
    assert words_of("हिन्दी बिल्ली, தமிழ்।") == ["हिन्दी", "बिल्ली", "தமிழ்"]
    assert words_of("قِطّة می‌رود") == ["قِطّة", "می‌رود"]
    assert words_of("don't, e\u0301te\u0301 猫が") == ["don't", "été", "猫", "が"]
