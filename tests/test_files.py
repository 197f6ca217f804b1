"""Documents from anywhere: limits of size, depth and aliases; messages that stay short."""

import json
import os

import pytest

from lumos.errors import NotFound, UserError, printable, shown
from lumos.files import check_model_config, folder_sha256, parse_json, parse_yaml, read_json, read_text

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 65 + "]" * 65, '{"a":' * 70 + "1" + "}" * 70, "9" * 5000, "{", "nul"])
def test_bad_json_is_one_user_error(text):
    with pytest.raises(UserError, match=r"^where is not valid JSON"):
        parse_json(text, "where")


@pytest.mark.parametrize(
    "text", [BOMB, MERGES, "[" * 100_000, "[" * 500 + "]" * 500, "a: " + "x" * 2**20, "? [a]: b", "!!python/name:os 1"]
)
def test_bad_yaml_is_one_short_user_error(text):
    with pytest.raises(UserError, match=r"^where is not valid YAML") as error:
        parse_yaml(text, "where")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(("parse", "form"), [(parse_json, "JSON"), (parse_yaml, "YAML")])
def test_a_number_of_thousands_of_digits_is_named(parse, form):
    with pytest.raises(UserError) as error:
        parse('{"a": ' + "9" * 5000 + "}", "where")
    assert str(error.value) == f"where is not valid {form}: it has a number of thousands of digits; shorten it"


def test_a_key_that_stands_twice_is_refused():
    for parse, text in ((parse_json, '[{"b": {"a": 1, "a": 2}}]'), (parse_yaml, "b:\n  a: 1\n  a: 2\n")):
        with pytest.raises(UserError, match=r"where is not valid .*: the key 'a' stands twice"):
            parse(text, "where")
    assert parse_json('{"a": 1, "a": 1}', "where") == {"a": 1}
    merged = parse_yaml("b: &b {a: 1}\nc: &c {<<: *b, a: 3}\nd: {<<: *c, e: 1}\n", "where")
    assert merged == {"b": {"a": 1}, "c": {"a": 3}, "d": {"a": 3, "e": 1}}


def test_documents_within_the_limits_are_read():
    deep = "[" * 64 + "]" * 64
    assert parse_json(deep, "w") == json.loads(deep)
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: [1, 2]}", "w")["b"] == {"x": 1, "y": [1, 2]}


def test_pipes_folders_and_absent_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("pipe", UserError), ("", UserError), ("absent", NotFound)):
        with pytest.raises(kind, match=r"cannot read .* as a list"):
            read_text(tmp_path / name, "a list")
    (tmp_path / "large").write_bytes(b"1" * 101)
    with pytest.raises(UserError, match="more than the 100 bytes"):
        read_json(tmp_path / "large", "a list", limit=100)


def test_shown_is_short_and_printable_for_any_value():
    level = "x"
    for _ in range(30):
        level = [level] * 9
    for value in (level, "x" * 10_000, {"k": "v" * 1000}, 10**10_000, "\x1b[2J\u202e", b"\0" * 999):
        assert len(shown(value)) <= 200
        assert shown(value).isprintable()
    assert shown("a b") == "'a b'"
    assert printable("a\x1b[31m\n\udcffé") == "a\\x1b[31m\\n\\udcffé"


@pytest.mark.parametrize(("encoding", "said"), [("utf-8-sig", "UTF-8 with a byte order mark"), ("utf-16", "UTF-16-LE with")])
def test_a_config_that_transformers_would_not_read_is_said(tmp_path, encoding, said):
    (tmp_path / "config.json").write_text('{"model_type": "lumos1"}', encoding="utf-8")
    check_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lumos1"}', encoding=encoding)
    with pytest.raises(UserError, match=f"{said}.*save it as UTF-8 without a mark"):
        check_model_config(tmp_path)


def test_a_folder_with_names_that_are_not_utf8_has_a_hash(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.json")).write_text("{}")
    assert len(folder_sha256(tmp_path)) == 64
