"""Texts that people write: their encodings, and the form in which a model learns captions and reads prompts.

In that form two texts that look alike are one.
"""

from __future__ import annotations

import codecs
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


BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
"""Encodings by the bytes with which editors mark them; UTF-32 stands before UTF-16, whose mark is its beginning."""
WITHOUT_MARK = {
    (False, True): "utf-16-le", (True, False): "utf-16-be",
    (False, True, False, True): "utf-16-le", (True, False, True, False): "utf-16-be",
    (False, True, True, True): "utf-32-le", (True, True, True, False): "utf-32-be",
}  # fmt: skip
"""Encodings by which of the first four bytes, or of the only two, of letters of English are zero."""


def encoding_of(data: bytes) -> tuple[str, int]:
    """Return the encoding of a text that begins with these bytes, and the length of its byte order mark.

    Without a mark it is UTF-8, or UTF-16 or UTF-32 if the zero bytes of its first characters, letters of English, say so. One
    character is not enough for UTF-16 unless it is the whole text, as U+4E00, with which many Chinese texts begin, has one too.
    """
    for name, mark in ((name, len(mark)) for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)):
        return name, mark
    return WITHOUT_MARK.get(tuple(byte == 0 for byte in data[:4]), "utf-8"), 0


def text_of(data: bytes, errors: str = "strict") -> str:
    """Return the text of bytes in UTF-8, or in the encoding that `encoding_of` finds, without a byte order mark.

    `errors` is that of `bytes.decode` for bytes that are not text; by default UnicodeDecodeError is raised.
    """
    name, mark = encoding_of(data)
    return data[mark:].decode(name, errors if name == "utf-8" or errors != "surrogateescape" else "replace")
