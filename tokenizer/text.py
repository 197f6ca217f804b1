"""The text tokenizer: one class for a sentencepiece ``.model`` and a Hugging Face ``tokenizer.json``.

A prompt is encoded as text only. ``encode`` never returns an id that controls the model (sequence
start, frame marks, masks, visual codes). sentencepiece itself never encodes text to a control symbol.
From a Hugging Face file, such entries and the merges that produce them are removed from the
vocabulary before the encoder is built. So ``"<reserved09000>"`` or ``"VIDVIDBAZ"`` in a prompt is
split into text pieces like any other word.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import tokenizers

from lumos.errors import UserError, as_text, reason_of, shown
from lumos.files import parse_json, read_bytes, read_prompts, updating_folder

FILE_NAMES = ("text_tokenizer.json", "tokenizer.json", "text_tokenizer.model", "tokenizer.model")
SUBFOLDER = "text_tokenizer"
PLACES = "|".join(map(re.escape, (*FILE_NAMES, SUBFOLDER)))
"""Pattern of the names in a folder under which a text tokenizer is looked for."""
MAX_VOCABULARY = 2**24
MAX_TEXT_LENGTH = 2**20
MAX_CAPTIONS_BYTES = 2**30

# Entries of the published vocabulary that are not text. Files do not flag all of them as special.
_NOT_TEXT = re.compile(r"<reserved\d+>|<racm3:break>|<eoss>|</?s>|<pad>|<unk>|(VIDVID|IMGIMG)[A-J]+Z")


class TextTokenizer:
    """Convert text to ids and ids to text.

    ``data`` is the content of the tokenizer file, ``kind`` is "sentencepiece" or "huggingface", and
    ``source`` names the file in error messages. ``limit`` is the first id that is not text for the
    model (its first visual code): :meth:`encode` returns smaller ids only. ``vocab_size`` is the
    number of ids in the file, ``max_text_id`` the largest id of a text piece. Raises UserError (a
    ValueError) if the file is damaged, of an unsupported kind, or has text pieces at ``limit`` or above.
    """

    def __init__(self, data: bytes, kind: str, *, limit: int | None = None, source: str = "the tokenizer file"):
        if kind not in ("sentencepiece", "huggingface"):
            raise UserError(f"tokenizer kind {shown(kind)} is unknown; use 'sentencepiece' or 'huggingface'")
        self.kind = kind
        self._data = data
        backend = _SentencePiece if kind == "sentencepiece" else _HuggingFace
        try:
            self._backend = backend(data, limit)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        except Exception as error:
            raise UserError(
                f"{source} is damaged or no {kind} tokenizer ({reason_of(error)}); copy it again from where it came from"
            ) from error
        self.vocab_size: int = self._backend.vocab_size
        self.max_text_id: int = self._backend.max_text_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``.

        No start or end id is added, and no id is a special or visual id. Raises UserError for text
        over 2**20 characters or with invalid Unicode.
        """
        if len(text) > MAX_TEXT_LENGTH:
            raise UserError(f"the text has {len(text):,} characters; allowed: at most {MAX_TEXT_LENGTH:,}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid Unicode at character {error.start}; type it again") from error
        return self._backend.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids`` and skip special and visual ids.

        Raises UserError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"id {i} is not in the vocabulary; ids are 0 to {self.vocab_size - 1}")
        return self._backend.decode(ids)

    def is_text(self, i: int) -> bool:
        """Return whether ``encode`` could return this id."""
        return self._backend.is_text(i)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a vocabulary entry, which may be special ("<s>"), or None if there is no such entry."""
        return self._backend.token_to_id(token)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the tokenizer file, unchanged, into ``folder`` and return its path.

        It replaces a tokenizer file of another name, which `from_pretrained` could find first. Other
        files of the folder stay.
        """
        name = "tokenizer.model" if self.kind == "sentencepiece" else "tokenizer.json"
        with updating_folder(folder, FILE_NAMES.__contains__) as writing:
            (writing / name).write_bytes(self._data)
        return Path(folder) / name

    @classmethod
    def from_pretrained(cls, path: str | Path, *, limit: int | None = None) -> TextTokenizer:
        """Load a tokenizer from a ``.model`` or ``.json`` file or from a folder.

        The file may also be in the folder's subfolder ``text_tokenizer``. Raises UserError if there is
        no such file.
        """
        file = find_tokenizer_file(Path(path))
        kind = "sentencepiece" if file.suffix == ".model" else "huggingface"
        data = read_bytes(file, "a text tokenizer")
        return cls(data, kind, limit=limit, source=str(file))

    @classmethod
    def train(
        cls,
        captions: Iterable[str] | str | Path,
        vocab_size: int,
        *,
        reserved_symbols: Iterable[str] = (),
        model_type: str = "bpe",
        character_coverage: float = 0.9995,
    ) -> TextTokenizer:
        """Train a sentencepiece tokenizer on captions (an iterable, or the path of a text file with one caption a line).

        Id 0 is "<s>" (start and padding), ids 1..n are ``reserved_symbols``, then come "<unk>", the 256
        bytes and the text pieces. Any text can be encoded: characters without a piece become bytes.
        Spaces and letter case are not changed, so ``decode(encode(text)) == text``. The only exception is
        U+2581, sentencepiece's sign for a space, which is decoded to a space. The training is
        deterministic. The vocabulary is smaller than ``vocab_size`` if the captions have fewer pieces.
        Raises UserError for a wrong option or if there are no captions.
        """
        symbols = list(reserved_symbols)
        if len(set(symbols)) != len(symbols) or any(s in ("", "<s>", "<unk>") for s in symbols):
            raise UserError(f"reserved symbols must be different, not empty, not '<s>' or '<unk>'; given: {shown(symbols)}")
        if model_type not in ("bpe", "unigram"):
            raise UserError(f"model_type {shown(model_type)} is unknown; use 'bpe' or 'unigram'")
        smallest = len(symbols) + 259
        if vocab_size > MAX_VOCABULARY:
            raise UserError(f"vocab_size {shown(vocab_size)} is too large; give at most {MAX_VOCABULARY:,}")
        if vocab_size < smallest:
            raise UserError(
                f"vocab_size {vocab_size} is too small: specials and bytes alone take {smallest - 1}; "
                f"give some hundreds more"
            )
        lines = list(_captions(captions))
        if not lines:
            raise UserError("there are no captions to train on; give at least one line of text")
        result = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=result,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                model_type=model_type,
                byte_fallback=True,
                character_coverage=character_coverage,
                bos_id=0,
                eos_id=-1,
                pad_id=-1,
                unk_id=len(symbols) + 1,
                control_symbols=symbols,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                split_digits=True,
                max_sentence_length=1 << 16,
                num_threads=1,
                minloglevel=3,
            )
        except RuntimeError as error:
            reason = str(error).split("] ")[-1]
            raise UserError(f"cannot train a text tokenizer of vocab_size {vocab_size}: {reason}") from error
        return cls(result.getvalue(), "sentencepiece", source="the trained tokenizer")


def find_tokenizer_file(path: Path) -> Path:
    """Return the tokenizer file at ``path``: the file itself, or one of FILE_NAMES in the folder or its subfolder."""
    if path.is_file():
        if path.suffix not in (".model", ".json"):
            raise UserError(f"{path} is no text tokenizer; give a sentencepiece .model or a Hugging Face .json file")
        return path
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}; give a tokenizer file or the folder that holds it")
    for folder in (path, path / SUBFOLDER):
        for name in FILE_NAMES:
            if (folder / name).is_file():
                return folder / name
    raise UserError(f"no text tokenizer in {path} or its subfolder {SUBFOLDER}/; looked for {', '.join(FILE_NAMES)}")


def _captions(captions: Iterable[str] | str | Path) -> Iterator[str]:
    if not isinstance(captions, str | Path):
        yield from (text for text in captions if text.strip())
        return
    lines = read_prompts(captions, "captions, one a line", MAX_CAPTIONS_BYTES, pipes=True).split("\n")
    yield from (line.rstrip("\r") for line in lines if line.strip())


class _SentencePiece:
    def __init__(self, data: bytes, limit: int | None):
        self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.vocab_size = self.model.get_piece_size()
        # Control symbols may have ids above the limit; a text piece there would have the id of a visual code.
        self.max_text_id = max(i for i in range(self.vocab_size) if self.is_text(i))
        if limit is not None and self.max_text_id >= limit:
            raise UserError(
                f"its text pieces reach id {self.max_text_id}, but ids from {limit} on are not text for this model; "
                f"train a smaller one (vocab_size {limit} or less)"
            )

    def is_text(self, i: int) -> bool:
        return not (self.model.is_control(i) or self.model.is_unused(i) or self.model.is_unknown(i))

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if self.is_text(i)])

    def token_to_id(self, token: str) -> int | None:
        i = self.model.piece_to_id(token)
        return i if self.model.id_to_piece(i) == token else None


class _HuggingFace:
    def __init__(self, data: bytes, limit: int | None):
        tree = parse_json(data.decode("utf-8"), "the file")
        model = tree["model"]
        vocab = model["vocab"]
        if not isinstance(vocab, dict):
            raise UserError(f"a {as_text(model.get('type'))} tokenizer is not supported; use BPE, WordPiece or WordLevel")
        added = {entry["content"]: entry["id"] for entry in tree.get("added_tokens") or []}
        self.ids: dict[str, int] = vocab | added
        if wrong := [i for i in self.ids.values() if type(i) is not int or not 0 <= i < MAX_VOCABULARY]:
            raise ValueError(f"the id {shown(wrong[0])} is no whole number from 0 to {MAX_VOCABULARY - 1:,}")
        self.vocab_size = max(self.ids.values()) + 1
        unknown = model.get("unk_token")  # this entry stays: the encoder returns it for text without a piece
        hidden = {
            token
            for token, i in self.ids.items()
            if token != unknown and (token in added or _NOT_TEXT.fullmatch(token) or (limit is not None and i >= limit))
        }
        model["vocab"] = {token: i for token, i in vocab.items() if token not in hidden}
        if unknown in added and unknown not in vocab:
            model["vocab"][unknown] = added[unknown]
        if not model["vocab"]:
            raise UserError("no text pieces are left in it; it belongs to another model")
        self.text_ids = frozenset(model["vocab"].values())
        self.max_text_id = max(self.text_ids)
        if limit is not None and self.max_text_id >= limit:
            raise UserError(f"its {shown(unknown)} has an id from {limit} on, where visual codes are; use another tokenizer")
        if "merges" in model:
            model["merges"] = [pair for pair in map(_pair, model["merges"]) if _usable(pair, hidden | {unknown})]
        # A stored truncation would shorten prompts without a message; a post-processor would add start ids.
        tree |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self.model = tokenizers.Tokenizer.from_str(json.dumps(tree))

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i in self.text_ids], skip_special_tokens=False)

    def is_text(self, i: int) -> bool:
        return i in self.text_ids

    def token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _usable(pair: list[str], hidden: set[str | None]) -> bool:
    return not hidden.intersection((*pair, "".join(pair)))
