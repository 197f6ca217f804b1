"""Lists of prompts in their three forms, and errors of rows and of whole lists."""

from __future__ import annotations

import json
import unicodedata

import pytest

from lumos.errors import UserError
from lumos.pipeline.options import all_options
from lumos.pipeline.request import ARGUMENTS, Request
from lumos.prompt_lists.clips import default_name, free_name, prompts_over_time, put_under_free_name, request_of
from lumos.prompt_lists.rows import PromptRow, columns, read_rows


def rows_of(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return read_rows(tmp_path / name)


def test_a_default_name_is_never_taken_twice(tmp_path):
    path = tmp_path / "a-7.mp4"
    assert free_name(path) == path
    path.touch()
    assert free_name(path) == tmp_path / "a-7-2.mp4"
    (tmp_path / "a-7-2.mp4.json").touch()  # the record of a clip that was moved away
    assert free_name(path) == tmp_path / "a-7-3.mp4"


def test_no_file_is_lost_that_another_process_writes_meanwhile(tmp_path, monkeypatch):
    path, source = tmp_path / "a-7.mp4", tmp_path / "source"
    source.write_text("mine")

    def chosen(wanted):
        found = free_name(wanted)
        if not path.exists():
            path.write_text("theirs")  # after the choice of the name, before its use
        return found

    monkeypatch.setattr("lumos.prompt_lists.clips.free_name", chosen)
    assert put_under_free_name(source, path) == tmp_path / "a-7-2.mp4"
    assert (path.read_text(), (tmp_path / "a-7-2.mp4").read_text()) == ("theirs", "mine")
    assert {file.name for file in tmp_path.iterdir()} == {"a-7.mp4", "a-7-2.mp4"}


def test_a_text_is_a_prompt_a_line(tmp_path):
    rows = rows_of(tmp_path, "a.txt", "\ufeffa red circle\n\n  the digit 7, moving up \r\n")
    assert rows == [PromptRow(1, 0, {"prompt": "a red circle"}), PromptRow(3, 1, {"prompt": "the digit 7, moving up"})]


def test_json_objects_and_tables_give_the_same_rows(tmp_path):
    whole = {
        "prompt": 'a "red" circle, small', "negative_prompt": "blue", "image": "pictures/a.png", "seed": 3, "num_frames": 9,
        "guidance_scale": 2.5, "mask_given_frames": True, "guidance_interval": [0.0, 0.5], "output": "a/b.mp4",
    }  # fmt: skip
    objects = rows_of(tmp_path, "a.jsonl", f"{json.dumps(whole)}\n{json.dumps({'prompt': 'x', 'seed': None})}\n")
    table = rows_of(
        tmp_path, "a.csv", ",".join(whole) + "\n"
        '"a ""red"" circle, small",blue,pictures/a.png,3,9,2.5,true,0 0.5,a/b.mp4\n,,,,,,,,\nx,,,,,,,,\n',
    )  # fmt: skip
    assert [row.options for row in objects] == [row.options for row in table]
    assert objects[0].options == {**whole, "image": str(tmp_path / "pictures/a.png")}
    assert [row.line for row in table] == [2, 4]


def test_pictures_are_found_under_names_of_other_systems(tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "gr\u00fcn.png").touch()
    names = ["pics\\gr\u00fcn.png", "pics/gru\u0308n.png", "pics\\gru\u0308n.png"]
    rows = rows_of(tmp_path, "a.jsonl", "".join(json.dumps({"prompt": "x", "image": name}) + "\n" for name in names))
    assert [row.options["image"] for row in rows] == [str(tmp_path / "pics" / "gr\u00fcn.png")] * 3


def test_line_numbers_count_the_lines_inside_a_cell(tmp_path):
    rows = rows_of(tmp_path, "a.csv", 'prompt\n"a\nb"\nc\n')
    assert [(row.line, row.options["prompt"]) for row in rows] == [(3, "a\nb"), (4, "c")]


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("a.jsonl", "{", "the row is not valid JSON: .* column 2"),
        ("a.jsonl", "[1]", "a JSON list; give an object"),
        ("a.jsonl", "[" * 99_999, "the row is not valid JSON: it is nested too deeply"),
        (
            "a.jsonl", '{"prompt": "x", "seed": ' + "9" * 5000 + "}",
            "the row is not valid JSON: it has a number of thousands of digits",
        ),
        ("a.jsonl", '{"prompt": "x", "stepz": 3}', "'stepz' is unknown; allowed: prompt, "),
        ("a.jsonl", '{"prompt": "x", "num_frame": 3}', "'num_frame' is unknown, did you mean num_frames\\? allowed: prompt, "),
        ("a.jsonl", '{"prompt": "x", "seed": 3, "seed": 4}', "the row is not valid JSON: the key 'seed' stands twice"),
        ("a.jsonl", '{"prompt": 3}', "prompt 3 is not allowed; give text, or a list of texts"),
        ("a.jsonl", '{"prompt": []}', "prompt \\[\\] is not allowed"),
        ("a.jsonl", '{"prompt": "x", "num_frames": "9"}', "num_frames '9' is not allowed; give a whole number"),
        ("a.jsonl", '{"prompt": "x", "mask_given_frames": 1}', "mask_given_frames 1 is not allowed; give true or false"),
        ("a.jsonl", '{"prompt": "x", "image": 1}', "image 1 is not allowed; give text"),
        ("a.jsonl", '{"prompt": "x", "seed": [1, "2"]}', "or a list of them"),
        ("a.jsonl", '{"prompt": "x", "guidance_interval": 0.5}', "give two numbers"),
        ("a.csv", "x,many,", "num_frames 'many' is not allowed; give a whole number"),
        ("a.csv", "x,9,yes", "mask_given_frames 'yes' is not allowed; give true or false"),
        ("a.csv", "x,9", "the row has 2 cells, but there are 3 columns"),
    ],
)
def test_a_row_that_cannot_be_read_spoils_no_other(tmp_path, name, row, problem):
    good = '{"prompt": "y"}' if name == "a.jsonl" else "y,,"
    head = "" if name == "a.jsonl" else "prompt,num_frames,mask_given_frames\n"
    bad, other = rows_of(tmp_path, name, f"{head}{row}\n{good}\n")
    assert other.options == {"prompt": "y"}
    assert other.number == 1
    with pytest.raises(UserError, match=problem):
        request_of(bad, {}, 0, 4)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "x", r"give a file that ends in \.txt, \.jsonl, \.csv"),
        ("a.txt", " \n\n", "holds no prompts"),
        ("a.csv", "prompt,colour\nx,red\n", "the column 'colour' is unknown or named twice; allowed: prompt"),
        ("a.csv", "prompt,prompt\nx,y\n", "the column 'prompt' is unknown or named twice"),
        ("a.csv", 'prompt\n"x\n', "no table of comma-separated values"),
    ],
)
def test_lists_of_another_form(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, name, text)


def test_lists_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.txt as a list of prompts: there is no such file"):
        read_rows(tmp_path / "nowhere.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"cannot read .* as a list of prompts"):
        read_rows(tmp_path / "b.txt")


def test_every_option_of_a_row_is_one_of_a_request():
    known = {"prompt", *ARGUMENTS, *all_options()}
    assert columns().keys() - {"output", "prompt_frames"} <= known
    assert known - columns().keys() == {"generator", "later_prompts", "given_frames"}


def test_a_row_overrides_the_command_line():
    defaults = {"guidance_scale": 2.0, "image": "a.png", "num_frames": 9, "num_videos_per_prompt": 2}
    row = PromptRow(3, 5, {"prompt": "x", "video": "b.mp4", "num_frames": 17})
    assert request_of(row, defaults, 100, 4) == Request.of(
        "x", video="b.mp4", num_frames=17, guidance_scale=2.0, num_videos_per_prompt=2, seed=105
    )
    two = PromptRow(1, 0, {"prompt": "x", "seed": [4, 9]})
    assert request_of(two, {}, 0, 4) == Request.of("x", num_videos_per_prompt=2, seed=[4, 9])
    assert request_of(PromptRow(1, 0, {"prompt": "x", "seed": 7}), defaults, 0, 4).image == "a.png"
    with pytest.raises(UserError, match="the row has no prompt"):
        request_of(PromptRow(1, 0, {"seed": 1}), {}, 0, 4)


def test_a_list_of_prompts_becomes_prompt_and_later_prompts():
    assert prompts_over_time(["a"], None, 9) == {"prompt": "a", "num_frames": 9}
    assert prompts_over_time(["a", "b", "c"], [9, 8, 4], None) == {
        "prompt": "a", "later_prompts": [(9, "b"), (17, "c")], "num_frames": 21
    }  # fmt: skip
    assert prompts_over_time(["a"], [9], 9)["num_frames"] == 9
    row = PromptRow(1, 0, {"prompt": ["a", "b"], "prompt_frames": [5, 4]})
    assert request_of(row, {}, 0, 4).later_prompts == [(5, "b")]
    with pytest.raises(UserError, match="2 prompts are given and none of their prompt_frames"):
        request_of(PromptRow(1, 0, {"prompt": ["a", "b"]}), {}, 0, 4)


def test_a_cell_may_hold_several_seeds(tmp_path):
    rows = rows_of(tmp_path, "a.csv", "prompt,seed\nx,3\ny,4 9\n")
    assert [row.options["seed"] for row in rows] == [3, [4, 9]]
    assert rows_of(tmp_path, "b.csv", "prompt,seed\nx,4 y\n")[0].problem.startswith("seed '4 y' is not allowed")


@pytest.mark.parametrize(("frames", "stride", "allowed"), [
    ([5, 4], 4, True), ([9], 4, True), ([5, 5], 4, False), ([4, 4], 4, False), ([3, 2], 1, True), ([5, 4, 6], 4, False),
])  # fmt: skip
def test_prompts_change_between_latent_frames(frames, stride, allowed):
    row = PromptRow(1, 0, {"prompt": ["a", "b", "c"][: len(frames)], "prompt_frames": frames})
    if allowed:
        assert request_of(row, {}, 0, stride).num_frames == sum(frames)
        return
    message = rf"prompt_frames \[{', '.join(map(str, frames))}\] is not allowed; give 1 \+ a multiple of {stride} for the first"
    with pytest.raises(UserError, match=message):
        request_of(row, {}, 0, stride)


def test_names_are_made_of_words():
    assert default_name("A red circle, moving!", False, "0001-") == "0001-a-red-circle-moving.mp4"
    assert default_name("Кошка, бежит", True, after="-7") == "кошка-бежит-7.png"
    assert default_name("हिन्दी है", False) == "हिन्दी-है.mp4"
    assert default_name("!?", True, after="-7") == "clip-7.png"
    assert default_name(unicodedata.normalize("NFD", "grün"), False) == default_name(unicodedata.normalize("NFC", "grün"), False)
    assert len(default_name("红色的圆" * 40, False, after="-18446744073709551615").encode()) < 255
    assert len(default_name("word " * 100, False)) < 70


def test_the_rows_and_names_that_the_docs_show(repo, tmp_path):
    text = (repo / "docs" / "generate" / "lists.md").read_text()
    rows = rows_of(tmp_path, "a.jsonl", "\n".join(line for line in text.splitlines() if line.startswith('{"prompt"')))
    assert len(rows) == 3
    assert [request_of(row, {}, 0, 4).num_frames for row in rows] == [None, 33, 33]
    paragraph = text[text.index("A row may contain") : text.index("Paths of pictures")]
    assert {name for name in columns() if f"`{name}`" in paragraph} == columns().keys() - all_options().keys()
