from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from lumos.errors import UserError
from tokenizer.text import TextTokenizer

SYMBOLS = ["<sep>", "<mask>", "<video>"]
CAPTIONS = [
    f"a {size} {colour} {shape} {motion} on a gray background, at 8 frames per second:"
    for size in ("small", "large")
    for colour in ("red", "green", "blue", "yellow", "cyan")
    for shape in ("circle", "square", "triangle")
    for motion in ("moves left", "slides up", "grows", "stays still")
]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
VISUAL = ["VIDVIDAZ", "VIDVIDBZ", "VIDVIDBAZ", "VIDVIDJIZ"]
TYPED_BY_USERS = [
    *SPECIALS,
    *SYMBOLS,
    *VISUAL,
    "<racm3:break>",
    "<eoss>",
    "<reserved09000>",
    "<reserved08999>x",
    "a <s> b",
    "IMGIMGABZ",
    "<0x41>",
    "x VIDVIDAZ y",
]


def published_form(flag_special: bool = True) -> dict:
    """A small byte-level BPE file with the layout of the published one: special tokens, codes, reserved ids, text, visual codes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIALS, "IMGIMGAZ", "IMGIMGABZ", "<eoss>", "<racm3:break>", "<reserved08999>", "<reserved09000>"]
    special = tokens[:4] + tokens[6:]
    merges: list[tuple[str, str]] = []
    tokens += letters
    # Merges that spell out a whole visual code and a whole special, as a hostile or careless file could hold them.
    for word in ["Ġred", "circle", *VISUAL, "<s>", "<reserved09000>"]:
        left = word[0]
        for letter in word[1:]:
            if (left, letter) not in merges:
                merges.append((left, letter))
            left += letter
            if left not in tokens and left not in VISUAL:
                tokens.append(left)
    first_visual = len(tokens)
    tokens += VISUAL
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex("(VIDVID|IMGIMG)[A-J]+Z"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    if flag_special:
        bpe.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
    bpe.enable_truncation(5)
    return {"json": bpe.to_str(), "first_visual": first_visual, "vocab": vocab}


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, 420, reserved_symbols=SYMBOLS)


@pytest.fixture(scope="module")
def published() -> TextTokenizer:
    return TextTokenizer(published_form()["json"].encode(), "huggingface")


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from([*TYPED_BY_USERS, " red circle", "\n "])).map("".join))
def test_any_text_comes_back_and_holds_no_special_id(text: str, trained: TextTokenizer, published: TextTokenizer):
    ids = trained.encode(text)
    assert trained.decode(ids) == text.replace("\u2581", " ")
    assert all(i > len(SYMBOLS) + 1 for i in ids)
    assert max(ids, default=0) <= trained.max_text_id
    ids = published.encode(text)
    assert published.decode(ids) == text
    assert all(10 <= i <= published.max_text_id for i in ids)


def test_layout_of_a_trained_vocabulary(trained: TextTokenizer):
    assert trained.token_to_id("<s>") == 0
    assert [trained.token_to_id(symbol) for symbol in SYMBOLS] == [1, 2, 3]
    assert trained.token_to_id("no such piece") is None
    assert trained.vocab_size == 420
    assert len(trained.encode("a large red circle moves left")) <= 8  # whole words were learned
    assert trained.encode("") == []
    assert trained.decode([0, 1, *trained.encode("red"), 2]) == "red"


@pytest.mark.parametrize("flag_special", [True, False])
@pytest.mark.parametrize("text", TYPED_BY_USERS)
def test_special_strings_are_plain_text(text: str, flag_special: bool):
    form = published_form(flag_special)
    tokenizer = TextTokenizer(form["json"].encode(), "huggingface")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(10 <= i < form["first_visual"] for i in ids)
    assert tokenizer.vocab_size == form["first_visual"] + len(VISUAL)
    assert tokenizer.token_to_id("<reserved09000>") == 9
    assert tokenizer.decode([0, 9, *ids, form["first_visual"]]) == text


def test_the_unguarded_file_does_emit_them():
    """Without the guard, the library would turn marks that a user types into control ids."""
    form = published_form()
    plain = tokenizers.Tokenizer.from_str(form["json"])
    plain.no_truncation()
    assert plain.encode("<reserved09000>").ids == [9]
    assert plain.encode("VIDVIDAZ").ids == [form["first_visual"]]


def test_ordinary_text_encodes_as_in_the_library():
    form = published_form()
    plain = tokenizers.Tokenizer.from_str(form["json"])
    plain.no_truncation()
    tokenizer = TextTokenizer(form["json"].encode(), "huggingface")
    for text in ("a red circle", "circle circle red\n VIDEO", "Größe 12, 漢字"):
        assert tokenizer.encode(text) == plain.encode(text, add_special_tokens=False).ids


def test_limit_hides_pieces_from_there_on():
    form = published_form()
    limit = form["vocab"]["circle"]
    tokenizer = TextTokenizer(form["json"].encode(), "huggingface", limit=limit)
    assert tokenizer.max_text_id < limit
    assert max(tokenizer.encode("a red circle")) < limit
    assert tokenizer.decode(tokenizer.encode("a red circle")) == "a red circle"


def test_limit_below_a_sentencepiece_vocabulary_is_refused(trained: TextTokenizer, tmp_path):
    trained.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="from 300 on"):
        TextTokenizer.from_pretrained(tmp_path, limit=300)
    assert TextTokenizer.from_pretrained(tmp_path, limit=420).vocab_size == 420


def test_training_is_deterministic_and_takes_a_file(tmp_path, trained: TextTokenizer):
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS) + "\n\n", encoding="utf-8")
    again = TextTokenizer.train(path, 420, reserved_symbols=SYMBOLS)
    first = trained.save_pretrained(tmp_path / "first").read_bytes()
    assert again.save_pretrained(tmp_path / "again").read_bytes() == first


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_too_large_a_vocabulary_shrinks(model_type: str):
    tokenizer = TextTokenizer.train(["red circle", "red square"], 5000, model_type=model_type)
    assert 257 < tokenizer.vocab_size <= 5000
    assert tokenizer.decode(tokenizer.encode("red  circle Ω")) == "red  circle Ω"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"captions": CAPTIONS, "vocab_size": 100}, "too small"),
        ({"captions": CAPTIONS, "vocab_size": 260}, "vocab"),
        ({"captions": [], "vocab_size": 400}, "no captions"),
        ({"captions": ["  ", ""], "vocab_size": 400}, "no captions"),
        ({"captions": "/no/such/file.txt", "vocab_size": 400}, "no/such/file"),
        ({"captions": CAPTIONS, "vocab_size": 400, "reserved_symbols": ["<a>", "<a>"]}, "different"),
        ({"captions": CAPTIONS, "vocab_size": 400, "reserved_symbols": ["<unk>"]}, "reserved"),
        ({"captions": CAPTIONS, "vocab_size": 400, "model_type": "word"}, "bpe"),
    ],
)
def test_training_faults_are_named_in_one_line(arguments: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        TextTokenizer.train(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "text_tokenizer.json", "text_tokenizer/text_tokenizer.json"])
def test_published_file_is_found_by_its_names(name: str, tmp_path):
    form = published_form()
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(form["json"], encoding="utf-8")
    tokenizer = TextTokenizer.from_pretrained(tmp_path)
    copy = TextTokenizer.from_pretrained(tokenizer.save_pretrained(tmp_path / "copy"))
    assert copy.encode(" red circle") == tokenizer.encode(" red circle")
    assert (tmp_path / "copy" / "tokenizer.json").read_text(encoding="utf-8") == form["json"]


def test_own_file_is_found_in_the_model_folder(trained: TextTokenizer, tmp_path):
    trained.save_pretrained(tmp_path / "text_tokenizer")
    assert TextTokenizer.from_pretrained(tmp_path).encode("a red circle") == trained.encode("a red circle")


def test_folder_without_a_tokenizer_lists_the_names(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json.*tokenizer\.model"):
        TextTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no file or folder"):
        TextTokenizer.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x0a\xff\xff", b'{"model": {"type": "BPE", "vocab": {"a": 0'])
def test_damaged_files_are_named_in_one_line(name: str, content: bytes, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        TextTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_faults_are_named(tmp_path, trained: TextTokenizer):
    unigram = {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    with pytest.raises(UserError, match="Unigram"):
        TextTokenizer.from_pretrained(tmp_path)
    (tmp_path / "words.txt").write_text("a")
    with pytest.raises(UserError, match=r"\.model"):
        TextTokenizer.from_pretrained(tmp_path / "words.txt")
    with pytest.raises(UserError, match="Unicode"):
        trained.encode("broken \udc80")
    with pytest.raises(UserError, match="0 to 419"):
        trained.decode([420])


def test_a_saved_tokenizer_replaces_one_of_another_kind(tmp_path, trained: TextTokenizer, published: TextTokenizer):
    """`from_pretrained` would otherwise go on finding the older file."""
    (tmp_path / "README.md").write_text("mine")
    for kind in (published, trained, published, trained):
        file = kind.save_pretrained(tmp_path)
        found = TextTokenizer.from_pretrained(tmp_path)
        assert (found.kind, found.encode("a red circle")) == (kind.kind, kind.encode("a red circle"))
        assert {path.name for path in tmp_path.iterdir()} == {"README.md", file.name}
