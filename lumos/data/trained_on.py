"""The record of a model's training data: the words of its captions, and lists of the content of synthetic scenes.

A model folder has this record in trained_on.json. A prompt with a word that no caption had is possible, but its clip
may show something else, which a note then says. Folders without the file get no notes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lumos.errors import UserError, shown
from lumos.files import read_json, write_json

TRAINED_ON_FILE = "trained_on.json"
MAX_BYTES = 2**24
MAX_WORDS = 20_000
"""The most words that are stored; of more, the list is not complete, and no prompt gets a note."""
MAX_SHOWN = 5
"""The most words that a note names."""
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
"""Characters of scripts that are written without spaces between words; each counts as a word."""
_MARKS = "\u0300-\u036f\u0591-\u05bd\u05bf-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0971-\u0dff\u200c\u200d"
"""Vowels and other marks of scripts with spaces, which belong to the letter before but count as no letters in Python."""
_LETTERS = rf"(?:(?![{_NO_SPACES}])[^\W_][{_MARKS}]*)+"
_WORD = re.compile(rf"[{_NO_SPACES}]|{_LETTERS}(?:['’-]{_LETTERS})*")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation, each once."""
    return list(dict.fromkeys(_WORD.findall(unicodedata.normalize("NFC", text).casefold())))


@dataclass(frozen=True)
class TrainedOn:
    """What a model was trained on.

    words         words of the captions, in lower case
    is_complete   whether no other word was in a caption
    lists         content of the synthetic scenes, as lists by name, such as shapes and emoji
    picture_psnr  the lowest PSNR, in dB, of pictures of the training that go through the video tokenizer and back; None: not known
    """

    words: frozenset[str]
    is_complete: bool = True
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    picture_psnr: float | None = None

    @classmethod
    def of(cls, words: Iterable[str], lists: Mapping[str, Sequence[str]] | None = None, is_complete: bool = True) -> TrainedOn:
        """Return the record of captions with these words; of more than MAX_WORDS words the first ones are kept."""
        found = list(dict.fromkeys(word for text in words for word in words_of(text)))
        return cls(frozenset(found[:MAX_WORDS]), is_complete and len(found) <= MAX_WORDS, dict(lists or {}))

    def joined(self, other: TrainedOn | None) -> TrainedOn:
        """Return the record of a model whose training continued that of `other`; it is not complete if `other` is None."""
        if other is None:
            return replace(self, is_complete=False)
        lists = {
            name: sorted({*self.lists.get(name, ()), *other.lists.get(name, ())})
            for name in dict.fromkeys((*other.lists, *self.lists))
        }
        words = sorted(self.words | other.words)
        known = [psnr for psnr in (self.picture_psnr, other.picture_psnr) if psnr is not None]
        complete = self.is_complete and other.is_complete and len(words) <= MAX_WORDS
        return TrainedOn(frozenset(words[:MAX_WORDS]), complete, lists, min(known, default=None))

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that no caption had, in order; an empty list if the words are not all known."""
        return [word for word in words_of(prompt) if word not in self.words] if self.is_complete and self.words else []

    def note(self, prompts: Iterable[str]) -> str | None:
        """Return a note on the words of the prompts that no caption had, or None if there are none."""
        unknown = list(dict.fromkeys(word for prompt in prompts for word in self.unknown_words(prompt)))
        if not unknown:
            return None
        said = ", ".join(shown(word, 40) for word in unknown[:MAX_SHOWN])
        said += f" and {len(unknown) - MAX_SHOWN} more" if len(unknown) > MAX_SHOWN else ""
        return f"no caption of this model's training had {said}; the clip may show something else (`lumos info` lists its words)"

    def as_json(self) -> dict[str, Any]:
        return {
            **{name: list(values) for name, values in self.lists.items()}, "picture_psnr": self.picture_psnr,
            "words_are_complete": self.is_complete, "words": sorted(self.words),
        }  # fmt: skip


def read_trained_on(folder: str | Path) -> TrainedOn | None:
    """Return what the model of a folder was trained on, or None if the folder does not say. UserError for a damaged file."""
    path = Path(folder) / TRAINED_ON_FILE
    return from_json(read_json(path, "what a model was trained on", MAX_BYTES), path) if path.is_file() else None


def trained_on_of(folder: str | Path, adapter: str | Path | None = None) -> TrainedOn | None:
    """Return what the model of a folder was trained on, with the adapter that is merged into it; None if it is not known."""
    base = read_trained_on(folder)
    if adapter is None or base is None:
        return base
    return base.joined(read_trained_on(adapter))


def from_json(stored: Any, where: str | Path) -> TrainedOn:
    """Return the value of `TrainedOn.as_json`. UserError, which begins with `where`, for anything else."""
    fields = dict(stored) if isinstance(stored, dict) else {}
    words, complete, psnr = (fields.pop(name, None) for name in ("words", "words_are_complete", "picture_psnr"))
    fields.pop("steps", None)
    texts = all(isinstance(value, list) and all(isinstance(v, str) for v in value) for value in (words, *fields.values()))
    number = psnr is None or (isinstance(psnr, int | float) and not isinstance(psnr, bool))
    if not texts or not isinstance(complete, bool) or not number:
        raise UserError(f"{where} is damaged: it must hold lists of words, words_are_complete and picture_psnr; copy it again")
    return TrainedOn(frozenset(words), complete, fields, psnr)


def write_trained_on(folder: str | Path, trained_on: TrainedOn | None) -> None:
    """Write trained_on.json into a folder; nothing is written for None."""
    if trained_on is not None:
        write_json(Path(folder) / TRAINED_ON_FILE, trained_on.as_json())
