from __future__ import annotations

import json
import os

import pytest

from lumos.cli import main
from lumos.errors import UserError
from lumos.evaluation.prompt_lists import BENCHMARKS, read_list

VBENCH = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["appearance_style"], "auxiliary_info": {"x": 1}},
    {"prompt_en": "a cat", "dimension": ["object_class"]},
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["appearance_style"]},
    {"prompt_en": "a cat", "dimension": ["temporal_flickering"]},
]
I2V = [
    {"prompt_en": "a squirrel", "dimension": ["i2v_subject", "temporal_flickering"], "image_name": "a squirrel.jpg"},
    {"prompt_en": "a squirrel, camera static", "dimension": ["camera_motion"], "image_name": "a squirrel.jpg"},
]
GENEVAL = ['{"tag":"single_object",  "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
           '{"tag": "colors", "prompt": "a photo of a bench", "rewritten": "a long wooden bench"}']  # fmt: skip


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def entries(name, path, **options):
    return read_list(BENCHMARKS[name], path, **options)


def test_vbench_makes_more_samples_of_filtered_dimensions(tmp_path):
    found = {e.prompt: e for e in entries("vbench", write(tmp_path / "list.json", VBENCH))}
    assert {prompt: len(e.files) for prompt, e in found.items()} == {
        "In a still frame, a stop sign": 25, "The bund Shanghai, oil painting": 5, "a cat": 25,
    }  # fmt: skip
    assert found["a cat"].files[:2] == ("a cat-0.mp4", "a cat-1.mp4")
    assert all(e.caption == e.prompt for e in found.values())
    assert {len(e.files) for e in entries("vbench", tmp_path / "list.json", samples=2)} == {2}


def test_vbench_i2v_draws_five_of_each_whatever_its_dimensions(tmp_path):
    found = entries("vbench-i2v", write(tmp_path / "list.json", I2V))
    assert [(len(e.files), e.image) for e in found] == [(5, "a squirrel.jpg")] * 2
    assert found[1].files[4] == "a squirrel, camera static-4.mp4"


def test_geneval_keeps_the_line_and_its_number(tmp_path):
    found = entries("geneval", write(tmp_path / "list.jsonl", "\n".join([GENEVAL[0], "", GENEVAL[1], ""])))
    assert found[0].files == tuple(f"00000/samples/{i:04d}.png" for i in range(4))
    assert [e.notes for e in found] == [((f"0000{n}/metadata.jsonl", GENEVAL[n] + "\n"),) for n in range(2)]
    assert [e.prompt for e in found] == ["a photo of a bench"] * 2  # one prompt, two tasks


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("long.txt", "a sign\nthe bund\na tabby\nother\nagain\n"),
        ("long.txt", "a sign\r\nthe bund\r\na tabby\r\nother\r\nagain\r\n"),
        ("long.json", {VBENCH[0]["prompt_en"] + ".mp4": "a sign", VBENCH[1]["prompt_en"]: "the bund", "a cat": "a tabby"}),
    ],
)
def test_captions_are_told_and_prompts_name_the_files(name, text, tmp_path):
    found = entries("vbench", write(tmp_path / "list.json", VBENCH), captions=write(tmp_path / name, text))
    assert [e.caption for e in found] == ["a sign", "the bund", "a tabby"]
    assert found[2].files[0] == "a cat-0.mp4"


def test_captions_from_a_field_of_the_list(tmp_path):
    lines = write(tmp_path / "list.jsonl", GENEVAL[1])
    assert entries("geneval", lines, caption_key="rewritten")[0].caption == "a long wooden bench"
    with pytest.raises(UserError, match="no caption for the prompt 'a photo of a bench' under 'long'"):
        entries("geneval", lines, caption_key="long")
    with pytest.raises(UserError, match="not both"):
        entries("geneval", lines, caption_key="rewritten", captions=lines)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "one\ntwo\n", "has 2 lines, but the list has 5 entries"),
        ("c.txt", "a\nb\n\nd\ne\n", "no caption for the prompt 'a cat' in"),
        ("c.json", {"a cat": "x"}, "no caption for the prompt 'In a still frame"),
        ("c.json", [1], "must be a JSON object"),
    ],
)
def test_captions_that_do_not_fit(name, text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        entries("vbench", write(tmp_path / "list.json", VBENCH), captions=write(tmp_path / name, text))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("vbench", {"a": 1}, "the prompt list is a JSON dict; it must be a list of objects with prompt_en, dimension"),
        ("vbench", [{"prompt_en": "a cat"}], "entry 0 of the prompt list has no dimension"),
        ("vbench", [{"prompt_en": " ", "dimension": []}], "has no prompt_en"),
        ("vbench", ["a cat"], "has no prompt_en"),
        ("vbench", [], "holds no prompts"),
        ("vbench", "{", "not valid JSON"),
        ("vbench-i2v", VBENCH, "entry 0 of the prompt list has no image_name"),
        ("geneval", '{"tag": "x", "prompt": "y"}\n{', "line 2 is not valid JSON"),
        ("geneval", '\n\n{"tag": "x", "prompt": "y"}\n{', "line 4 is not valid JSON"),
        ("geneval", '["x"]', "entry 0 of the prompt list has no tag"),
        ("vbench", [{"prompt_en": "a cat/dog", "dimension": []}], "'a cat/dog' holds '/'; shorten it"),
        ("vbench", [{"prompt_en": "a" * 252, "dimension": []}], "would be a name of 258 bytes, 255 are possible"),
        ("vbench", [{"prompt_en": "ä" * 126, "dimension": []}], "would be a name of 258 bytes"),
    ],
)
def test_invalid_prompt_lists_are_refused(name, data, message, tmp_path):
    with pytest.raises(UserError, match=message):
        entries(name, write(tmp_path / "list", data))


def test_the_longest_name_can_be_written(tmp_path):
    (entry,) = entries("vbench", write(tmp_path / "list.json", [{"prompt_en": "a" * 249, "dimension": []}]))
    (tmp_path / entry.files[0]).touch()
    assert len(os.fsencode(entry.files[0])) == 255


@pytest.mark.parametrize("samples", [0, -1])
def test_samples_must_be_positive(samples, tmp_path):
    with pytest.raises(UserError, match=f"samples {samples} is not allowed"):
        entries("vbench", write(tmp_path / "list.json", VBENCH), samples=samples)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_included_lists_are_of_the_official_form(name, repo):
    folder = repo / "configs" / "evaluation"
    path = folder / {"vbench": "vbench.json", "vbench-i2v": "vbench_i2v.json", "geneval": "geneval.jsonl"}[name]
    found = entries(name, path)
    assert 2 <= len(found) <= 8
    for entry in found:
        assert entry.image is None or (folder / "vbench_i2v_images" / entry.image).is_file()


def test_a_missing_list_is_one_line(tmp_path, capsys):
    assert main(["evaluate", "vbench", "--prompts", str(tmp_path / "no.json"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "no.json as the prompts of VBench, its VBench_full_info.json: there is no such file" in err
    assert not (tmp_path / "out").exists()
