"""The form in which a model learns captions and reads prompts, so that two texts that look alike are one text to it."""

from __future__ import annotations

import re
import unicodedata

_UNSEEN = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
"""Characters that show nothing: byte order marks, soft hyphens, places for line breaks, directions, as web pages have them.
Those that join and tag letters and emoji (U+200C, U+200D, U+E0020 and more) are not among them."""
_BLANK = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and symbols that show nothing."""
_LOST = "\ufffd\ufffe\uffff\0"
_WRONG = re.compile(f"[\ud800-\udfff{_LOST}\x01-\x1f\x7f-\x9f]")


def one_line(text: str) -> str:
    """Return a text as one line with single spaces, in the Unicode form NFC, without characters that show nothing."""
    return unicodedata.normalize("NFC", " ".join(_UNSEEN.sub("", text).split()))


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing."""
    return all(unicodedata.category(c) in ("Cc", "Cf", "Mn", "Mc", "Me", "Zs", "Zl", "Zp") or c in _BLANK for c in text)


def wrong_character(text: str) -> str | None:
    """Return what is wrong with a text of `one_line` that has a character which no caption or prompt has, or None."""
    if (found := _WRONG.search(text)) is None:
        return None
    if found[0] in _LOST:
        why = "because characters were lost; write it again"
    elif "\ud800" <= found[0] <= "\udfff":
        why = "because it is not UTF-8 text; save it as UTF-8"
    else:
        why = "a control character, as text of another encoding or of a terminal has; save it as UTF-8 text"
    return f"has U+{ord(found[0]):04X}, {why}"
