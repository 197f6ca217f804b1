"""The totals against published ones: rows that print every dimension and the totals of the official scripts."""

from __future__ import annotations

import json
import zipfile

import pytest

from lumos.cli import main
from lumos.errors import UserError
from lumos.evaluation.scores import GENEVAL_TASKS, PARTS, geneval_totals, read_scores, summarize, vbench_totals

DIMENSIONS = {name: [d for _, part in parts.values() for d in part] for name, parts in PARTS.items()}

# Total, quality, semantic, then the sixteen dimensions in the order of PARTS, in percent. The first seven are in
# FlashVideo (arXiv 2502.05179, table of all dimensions, read in the copy of github.com/deep-diver/ai-paper-reviewer), the last two
# in AccVideo (github.com/aejion/AccVideo, README, "VBench Results"). Left out: FlashVideo's row at 8 fps, whose printed semantic
# score (82.10) is 0.10 below what its printed dimensions give, and two rows that are printed with the same numbers.
VBENCH = """
Vchitect 2.0 + VEnhancer | 82.24 83.54 77.06 | 96.83 96.66 98.57 98.98 63.89 60.41 65.35 | 86.61 68.84 97.20 87.04 57.55 56.57 23.73 25.01 27.57
CogVideoX-1.5            | 82.17 82.78 79.76 | 96.87 97.35 98.88 98.31 50.93 62.79 65.02 | 87.47 69.65 97.20 87.55 80.25 52.91 24.89 25.19 27.30
CogVideoX-5B             | 81.61 82.75 77.04 | 96.23 96.52 98.66 96.92 70.97 61.98 62.90 | 85.23 62.11 99.40 82.81 66.35 53.20 24.91 25.38 27.59
CogVideoX-2B             | 81.57 82.51 77.79 | 96.42 96.53 98.45 97.76 58.33 61.47 65.60 | 87.81 69.35 97.00 86.87 54.64 57.51 24.93 25.56 28.01
Mochi-1                  | 80.13 82.64 70.08 | 96.99 97.28 99.40 99.02 61.85 56.94 60.64 | 86.51 50.47 94.60 79.73 69.24 36.99 20.33 23.65 25.15
OpenSoraPlan V1.1        | 78.00 80.91 66.38 | 95.73 96.73 99.03 98.28 47.72 56.85 62.28 | 76.30 40.35 86.80 89.19 53.11 27.17 22.90 23.87 26.52
FlashVideo, 24 fps       | 82.99 83.35 81.56 | 97.19 97.09 98.52 98.89 56.88 62.11 65.40 | 88.38 78.93 99.40 84.84 82.16 57.43 24.36 25.26 27.59
AccVideo-HunyuanT2V      | 83.26 84.58 77.96 | 94.46 97.45 99.18 98.79 75.00 62.08 65.64 | 92.99 67.33 95.60 94.11 75.70 54.72 19.87 23.71 27.21
AccVideo-WanXT2V         | 85.95 86.62 83.25 | 95.02 97.75 99.54 97.95 93.33 64.21 68.42 | 98.38 86.58 97.40 92.04 75.68 59.82 23.88 24.62 27.34
"""  # noqa: E501

# Total, quality, I2V, then the nine dimensions in the order of PARTS. From Step-Video-TI2V (github.com/stepfun-ai/Step-Video-TI2V,
# README, "Comparisons"; arXiv 2503.11251). Left out: its OSTopB, whose printed I2V score (93.25) is 0.37 above what its printed
# dimensions give.
VBENCH_I2V = """
Step-Video-TI2V, motion 10 | 87.98 80.86 95.11 | 95.62 96.92 99.08 48.78 61.74 70.17 | 48.15 97.44 98.45
Step-Video-TI2V, motion 5  | 87.80 80.11 95.50 | 96.02 97.06 99.24 36.58 62.29 70.43 | 49.22 97.85 98.63
OSTopA                     | 87.49 80.36 94.63 | 94.52 96.47 98.09 53.41 61.04 71.12 | 29.58 97.73 98.83
"""

# Overall, then the six tasks, of GenEval's own README (github.com/djghosh13/geneval), which prints two digits.
GENEVAL = """
CLIP retrieval        | 0.35 | 0.89 0.22 0.37 0.62 0.03 0.00
minDALL-E             | 0.23 | 0.73 0.11 0.12 0.37 0.02 0.01
Stable Diffusion v1.5 | 0.43 | 0.97 0.38 0.35 0.76 0.04 0.06
Stable Diffusion v2.1 | 0.50 | 0.98 0.51 0.44 0.85 0.07 0.17
Stable Diffusion XL   | 0.55 | 0.98 0.74 0.39 0.85 0.15 0.23
IF-XL                 | 0.61 | 0.97 0.74 0.66 0.81 0.13 0.35
"""
GENEVAL_PROMPTS = dict(zip(GENEVAL_TASKS, (80, 99, 80, 94, 100, 100), strict=True))  # 553 prompts


def rows(text):
    lines = [line.split("|") for line in text.strip().splitlines()]
    return [pytest.param(*([float(x) for x in part.split()] for part in parts), id=name.strip()) for name, *parts in lines]


@pytest.mark.parametrize(("totals", "quality", "semantic"), rows(VBENCH))
def test_published_vbench_rows(totals, quality, semantic):
    scores = dict(zip(DIMENSIONS["vbench"], [x / 100 for x in quality + semantic], strict=True))
    found = vbench_totals("vbench", scores)
    assert [100 * found[part] for part in ("total", "quality", "semantic")] == pytest.approx(totals, abs=0.011)
    assert found["missing"] == []


@pytest.mark.parametrize(("totals", "quality", "i2v"), rows(VBENCH_I2V))
def test_published_vbench_i2v_rows(totals, quality, i2v):
    scores = dict(zip(DIMENSIONS["vbench-i2v"], [x / 100 for x in quality + i2v], strict=True))
    found = vbench_totals("vbench-i2v", scores)
    assert [100 * found[part] for part in ("total", "quality", "i2v")] == pytest.approx(totals, abs=0.011)


def geneval_rows(shares):
    """Write a results.jsonl in which each task has the given share of right pictures, with four pictures for each prompt."""
    for (tag, prompts), share in zip(GENEVAL_PROMPTS.items(), shares, strict=True):
        for i in range(4 * prompts):
            right = i < round(share * 4 * prompts)
            yield {"tag": tag, "prompt": f"{tag} {i // 4}", "correct": right, "filename": "x", "reason": ""}


@pytest.mark.parametrize(("overall", "tasks"), rows(GENEVAL))
def test_published_geneval_rows(overall, tasks, tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in geneval_rows(tasks)))
    found = summarize("geneval", [file])
    assert found["total"] == pytest.approx(overall[0], abs=0.0075)  # six shares and their mean, all printed with two digits
    assert (found["images"], found["prompts"]) == (2212, 553)
    assert found["tasks"]["counting"]["images"] == 320


def test_geneval_is_the_mean_over_tasks_and_not_over_pictures():
    many = [{"tag": tag, "prompt": tag, "correct": False} for tag in GENEVAL_TASKS[1:]]
    found = geneval_totals([*many, *[{"tag": "single_object", "prompt": str(i), "correct": True} for i in range(95)]])
    assert found["total"] == pytest.approx(1 / 6)
    assert found["prompts_ever_right"] == 0.95
    assert geneval_totals(many)["total"] is None
    assert geneval_totals(many)["missing"] == ["single_object"]


def official(scores):
    return {name: [score, [{"video_path": "x.mp4", "video_results": score}]] for name, score in scores.items()}


@pytest.fixture
def results(tmp_path):
    """One official file for each dimension, and the list that VBench writes beside them."""
    folder = tmp_path / "evaluation_results"
    folder.mkdir()
    for name in DIMENSIONS["vbench"]:
        (folder / f"{name}_eval_results.json").write_text(json.dumps(official({name: 0.5})))
        (folder / f"{name}_full_info.json").write_text('[{"prompt_en": "a cat"}]')
    return folder


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_results_with_byte_order_marks_are_read(tmp_path, encoding):
    text, file, archive = '{"color": [0.5, []]}', tmp_path / "a_eval_results.json", tmp_path / "a.zip"
    file.write_bytes(text.encode(encoding))
    with zipfile.ZipFile(archive, "w") as made:
        made.write(file, file.name)
    for path in (file, archive):
        assert read_scores([path]) == {"color": 0.5}


def test_files_folders_and_zips_are_read_alike(results, tmp_path, capsys):
    files = sorted(map(str, results.glob("*_eval_results.json")))
    archive = tmp_path / "evaluation_results.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for file in results.iterdir():
            z.write(file, f"inside/{file.name}")
        z.writestr("__MACOSX/._x.json", b"\x00")
    totals = []
    for given in (files, [str(results)], [str(archive)]):
        out = tmp_path / "totals.json"
        assert main(["evaluate", "vbench", "--aggregate", *given, "--output", str(out), "--json"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out) == json.loads(out.read_text())
        assert any(line.split()[:1] == ["total"] for line in said.err.splitlines())
        totals.append(json.loads(out.read_text())["total"])
    half = vbench_totals("vbench", dict.fromkeys(DIMENSIONS["vbench"], 0.5))["total"]
    assert totals == [half] * 3


def test_a_missing_dimension_leaves_its_part_and_the_total_open(results, capsys):
    (results / "scene_eval_results.json").unlink()
    assert main(["evaluate", "vbench", "--aggregate", str(results), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["semantic"], found["total"], found["missing"]) == (None, None, ["scene"])
    assert found["quality"] is not None


def test_vbench_i2v_totals_leave_out_temporal_flickering():
    scores = dict.fromkeys(DIMENSIONS["vbench-i2v"], 0.5)
    assert vbench_totals("vbench-i2v", scores | {"temporal_flickering": 0.9}) == vbench_totals("vbench-i2v", scores)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"color": [94.2, []]}', "color has the score 94.2; the official files hold scores from 0 to 1"),
        ('{"color": [NaN, []]}', "has the score nan"),
        ('{"color": [true, []]}', "has the score True"),
        ('{"colour": [0.5, []]}', "colour is no dimension of vbench; its dimensions are subject_consistency"),
        ('{"i2v_subject": [0.5, []]}', "i2v_subject is no dimension of vbench"),
        ('{"color": 0.5}', "color is 0.5, not [score, details]"),
        ("[1]", "hold no results of VBench"),
        ("{", "is not valid JSON"),
    ],
)
def test_what_is_no_result_of_vbench_is_refused(text, message, tmp_path, capsys):
    (tmp_path / "x.json").write_text(text)
    assert main(["evaluate", "vbench", "--aggregate", str(tmp_path / "x.json")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_two_files_that_disagree_are_refused(tmp_path):
    for name, score in (("a", 0.5), ("b", 0.6)):
        (tmp_path / f"{name}.json").write_text(json.dumps(official({"color": score})))
    with pytest.raises(UserError, match=r"color is 0.5 in .*a.json, but 0.6 in .*b.json"):
        summarize("vbench", [tmp_path])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.json", None, "cannot read"),
        ("x.zip", "no zip", "as a zip of results"),
    ],
)
def test_unreadable_results(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        summarize("vbench", [tmp_path / name])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"tag": "colors", "prompt": "x"}', "entry 0 of .* has no correct"),
        ('{"tag": "colors", "prompt": "x", "correct": 1}', "has no correct"),
        ("oops", "line 1, is not valid JSON"),
        ("\n\n{", "line 3, is not valid JSON"),
        ("", "hold no results"),
    ],
)
def test_what_is_no_result_of_geneval_is_refused(text, message, tmp_path):
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        summarize("geneval", [tmp_path / "results.jsonl"])


def test_aggregate_excludes_other_options(tmp_path, capsys):
    assert main(["evaluate", "vbench", "--aggregate", "x.json", "--out", "y", "--seed", "0"]) == 2
    assert "--out, --seed have no effect with --aggregate" in capsys.readouterr().err
    assert main(["evaluate", "vbench", "--prompts", "x.json", "--out", "y", "--output", "z.json"]) == 2
    assert "--output has no effect without --aggregate" in capsys.readouterr().err
