"""Lists of clips on the command line: results, errors, and resuming after every kind of stop."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from list_folder import clips_in, write_list
from PIL import Image

from lumos import LumosPipeline
from lumos.models.lumos1.sampling import generate_frames
from lumos.pipeline import request as pipeline_request
from lumos.video.io import read_image, read_video, write_video


@pytest.mark.slow
def test_fifty_prompts_of_which_three_are_bad(generate):
    rows = [{"prompt": f"a red circle moves left {n}"} for n in range(50)]
    rows[6] = {"prompt": "x", "num_frames": 6}
    rows[20] = '{"prompt": "x"'
    rows[49] = {"prompt": "x", "image": "nowhere.png"}
    code, out, err = generate("--prompts", write_list(*rows), "--output-dir", "out", "--batch-size", 16)
    assert code == 1
    assert out == "out  47 made now  47 clips in all  50 rows"
    assert err[:-1] == [
        "list.jsonl line 7: num_frames 6 is not allowed; it must be 1 + a multiple of 4, for example 5 or 9",
        "list.jsonl line 21: the row is not valid JSON: Expecting ',' delimiter: line 1 column 15 (char 14)",
        next(line for line in err if "line 50" in line),
    ]
    assert "nowhere.png" in err[2]
    assert err[-1] == "error: 3 of 50 rows are bad, as said above; the other clips are in out"
    names = [f"{n + 1:04d}-a-red-circle-moves-left-{n}.mp4" for n in range(50) if n not in (6, 20, 49)]
    assert list(clips_in("out")) == names
    assert sorted(os.listdir("out")) == sorted([*names, *(f"{name}.json" for name in names)])
    seeds = [json.loads(Path(f"out/{name}.json").read_text())["seed"] for name in names]
    assert seeds == [n for n in range(50) if n not in (6, 20, 49)]


def test_where_every_row_is_bad_nothing_is_made(generate):
    code, out, err = generate("--prompts", write_list("a", "b"), "--output-dir", "out")
    assert (code, out, len(err)) == (2, "", 3)
    assert err[-1] == "error: none of the 2 rows of list.jsonl can be made, for the reasons above"
    assert generate("--prompts", write_list({"prompt": " "}), "--output-dir", "out")[0] == 2
    assert not Path("out").exists()


@pytest.mark.slow
def test_each_clip_is_the_one_made_alone(generate, monkeypatch):
    """Rows of one form share a batch, also with other rows between them; the model is loaded once."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save("photo.png")
    write_video("clip.mp4", np.random.default_rng(0).integers(0, 255, (20, 32, 48, 3), dtype=np.uint8), 8)
    rows = [
        {"prompt": "x", "output": "a.webp"},
        {"prompt": "a red circle", "image": "photo.png", "seed": 5, "output": "b.webp"},
        {"prompt": ["x", "a red circle"], "prompt_frames": [5, 8], "output": "over/c.webp"},
        {"prompt": "the digit 7", "negative_prompt": "x", "guidance_scale": 4, "output": "d.webp"},
        {"prompt": "y", "output": "e.webp"},
        {"prompt": "a red circle", "video": "clip.mp4", "num_frames": 17, "output": "f.webp"},
        {"prompt": "y", "image": "photo.png", "seed": 9, "output": "g.webp"},
        {"prompt": "y", "num_frames": 1, "output": "h.png"},
        {"prompt": ["y", "x"], "prompt_frames": [5, 8], "output": "i.webp"},
    ]
    sizes, loads = [], []
    load = LumosPipeline.from_pretrained
    monkeypatch.setattr(LumosPipeline, "from_pretrained", lambda *a, **k: loads.append(1) or load(*a, **k))
    counted = lambda model, rows, *a, **k: sizes.append(len(rows)) or generate_frames(model, rows, *a, **k)  # noqa: E731
    monkeypatch.setattr("lumos.models.lumos1.pipeline.generate_frames", counted)
    code, _, err = generate("--prompts", write_list(*rows), "--output-dir", "out", "--num-inference-steps", 3, "--seed", 100)
    assert (code, err) == (0, [])
    assert (sizes, loads) == ([2, 2, 2, 1, 1, 1], [1])
    for number, row in enumerate(rows):
        prompts = [row["prompt"]] if isinstance(row["prompt"], str) else row["prompt"]
        rest = {key: value for key, value in row.items() if key not in ("prompt", "output", "prompt_frames", "seed")}
        options = [part for key, value in rest.items() for part in (f"--{key.replace('_', '-')}", value)]
        frames = ["--prompt-frames", *row["prompt_frames"]] if "prompt_frames" in row else []
        told = [part for prompt in prompts for part in ("--prompt", prompt)]
        suffix = Path(row["output"]).suffix
        seed = row.get("seed", 100 + number)
        alone = generate(*told, *frames, *options, "--seed", seed, "--num-inference-steps", 3, "--output", f"alone{suffix}")
        assert alone[0] == 0
        read = read_image if suffix == ".png" else lambda path: read_video(path)[0]
        assert np.array_equal(read(f"out/{row['output']}"), read(f"alone{suffix}")), row
        record, other = (json.loads(Path(f"{path}.json").read_text()) for path in (f"out/{row['output']}", f"alone{suffix}"))
        for key in ("prompt", "later_prompts", "negative_prompt", "seed", "settings", "dtype"):
            assert record[key] == other[key], (row, key)


def test_texts_and_tables(generate):
    Path("list.txt").write_text("x\n\na red circle\n")
    Path("list.csv").write_text("seed,prompt\n,x\n,a red circle\n")
    assert generate("--prompts", "list.txt", "--output-dir", "a") == (0, "a  2 made now  2 clips in all  2 rows", [])
    assert generate("--prompts", "list.csv", "--output-dir", "b")[0] == 0
    assert list(clips_in("a")) == ["0001-x.mp4", "0002-a-red-circle.mp4"]
    assert clips_in("a") == clips_in("b")


@pytest.mark.slow
def test_several_clips_of_one_prompt(generate):
    assert generate("--prompt", "x", "--seed", 1, 7, "--output-dir", "a")[:2] == (0, "a  2 made now  2 clips in all  1 rows")
    assert list(clips_in("a")) == ["x-1.mp4", "x-7.mp4"]
    assert generate("--prompt", "x", "--seed", 6, "--num-videos-per-prompt", 2)[0] == 0
    assert list(clips_in("outputs")) == ["x-6.mp4", "x-7.mp4"]
    assert clips_in("outputs")["x-7.mp4"] == clips_in("a")["x-7.mp4"]
    generate("--prompt", "x", "--seed", 7, "--output", "alone.mp4")
    assert np.array_equal(read_video("alone.mp4")[0], read_video("a/x-7.mp4")[0])
    assert generate("--prompt", "x", "--num-videos-per-prompt", 2, "--output-dir", "drawn")[0] == 0
    assert len(clips_in("drawn")) == 2
    rows = [{"prompt": "x", "seed": [4, 2], "output": "c/x.webp"}, {"prompt": "y", "num_videos_per_prompt": 2}]
    assert generate("--prompts", write_list(*rows), "--output-dir", "b")[0] == 0
    assert sorted(clips_in("b")) == ["0002-y-1.mp4", "0002-y-2.mp4", "c/x-2.webp", "c/x-4.webp"]


@pytest.mark.slow
def test_only_missing_or_changed_clips_are_made(generate, micro_folder, tmp_path):
    rows = [{"prompt": f"a red circle {n}", "output": f"{n}.webp"} for n in range(5)]
    run = lambda *more: generate("--prompts", write_list(*rows), "--output-dir", "out", "--batch-size", 1, *more)  # noqa: E731
    assert run()[1].startswith("out  5 made now")
    whole = clips_in("out")
    assert run()[1].startswith("out  0 made now")
    Path("out/1.webp").unlink()
    Path("out/2.webp.json").unlink()
    Path("out/3.webp.json").write_text("{")
    code, out, err = run()
    assert (code, out.split("  ")[1]) == (0, "3 made now")
    assert err == ["note: 2 clips in out, 2.webp first, were made with other inputs and are made again"]
    assert clips_in("out") == whole
    rows[4]["guidance_scale"] = 7
    rows.append({"prompt": "y", "output": "5.webp"})
    assert run()[1].startswith("out  2 made now  6 clips")
    assert clips_in("out")["0.webp"] == whole["0.webp"]
    assert clips_in("out")["4.webp"] != whole["4.webp"]
    assert run("--num-inference-steps", 3)[1].startswith("out  6 made now")
    assert run("--num-inference-steps", 3, "--dtype", "bfloat16")[1].startswith("out  6 made now")
    pipe = LumosPipeline.from_pretrained(micro_folder, device="cpu")
    with torch.no_grad():
        pipe.model.lm_head.weight.mul_(2)
    pipe.save_pretrained(tmp_path / "other")
    other = run("--num-inference-steps", 3, "--dtype", "bfloat16", "--model", tmp_path / "other")
    assert other[1].startswith("out  6 made now")


def test_a_given_picture_that_changes_is_another_clip(generate):
    for colour in ("red", "blue"):
        Image.new("RGB", (24, 16), colour).save("photo.png")
        args = ("--prompts", write_list({"prompt": "x", "image": "photo.png"}), "--output-dir", "out")
        assert [generate(*args)[1].split("  ")[1] for _ in range(2)] == ["1 made now", "0 made now"]


def test_a_row_does_not_overwrite_an_input_of_a_clip(generate):
    write_video("source.mp4", np.zeros((9, 16, 24, 3), np.uint8), 8)
    before = Path("source.mp4").read_bytes()
    rows = write_list({"prompt": "y", "output": "source.mp4"}, {"prompt": "x", "video": "source.mp4", "num_frames": 9})
    code, _, err = generate("--prompts", rows, "--output-dir", ".")
    assert code == 1
    assert "source.mp4 is or holds an input of this run" in err[0]
    assert Path("source.mp4").read_bytes() == before


def test_a_picture_is_read_once_for_all_its_clips(generate, monkeypatch):
    Image.new("RGB", (24, 16)).save("a.png")
    read, calls = pipeline_request.load_image, []
    monkeypatch.setattr(pipeline_request, "load_image", lambda image: calls.append(image) or read(image))
    assert generate("--prompt", "x", "--image", "a.png", "--num-videos-per-prompt", 8, "--seed", 1)[0] == 0
    assert len(calls) == 1 + 2  # when the row is checked, and for each batch of four


def test_notes_about_a_row_are_printed_once_before_the_work(generate):
    rows = write_list({"prompt": "x", "mask_given_frames": True})
    code, _, err = generate("--prompts", rows, "--output-dir", "out")
    assert (code, err) == (0, ["list.jsonl line 1: note: mask_given_frames=True has no effect on a clip without image or video"])


@pytest.mark.slow
def test_an_output_cannot_also_be_a_folder_of_an_output(generate, monkeypatch):
    monkeypatch.setattr("lumos.commands.generate_list.make_clips", lambda *a: (1, 0))
    rows = ({"prompt": "x", "output": "a.mp4/b.mp4"}, {"prompt": "x", "output": "a.mp4"})
    code, _, err = generate("--prompts", write_list(*rows), "--output-dir", "out")
    assert code == 1
    assert err[0].startswith("list.jsonl line 2: a.mp4 is the folder of another clip")


def test_an_empty_negative_prompt_counts_as_no_prompt(generate):
    """This holds also in a batch with prompts that have a negative prompt, or none."""
    rows = [{"prompt": "x", "seed": 1, "output": f"{n}.mp4", "negative_prompt": text} for n, text in enumerate((" ", "y", ""))]
    rows.append({"prompt": "x", "seed": 1, "output": "3.mp4"})
    assert generate("--prompts", write_list(*rows), "--output-dir", "out")[0] == 0
    records = [json.loads(Path(f"out/{n}.mp4.json").read_text()) for n in range(4)]
    assert [record["negative_prompt"] for record in records] == [None, "y", None, None]
    blank, told, empty, none = (read_video(f"out/{n}.mp4")[0] for n in range(4))
    assert np.array_equal(blank, none)
    assert np.array_equal(empty, none)
    assert not np.array_equal(told, none)


def test_several_seeds_never_write_over_a_default_name(generate):
    """Clips with other settings, or of another prompt with the same words, get new names; the same command makes no clip twice."""
    ask = lambda prompt, *more: generate("--prompt", prompt, "--seed", 1, 2, "--num-frames", 1, *more)  # noqa: E731
    assert ask("красный круг")[1].startswith("outputs  2 made now")
    first = clips_in("outputs")
    assert first.keys() == {"красный-круг-1.png", "красный-круг-2.png"}
    assert ask("красный круг")[1].startswith("outputs  0 made now")
    assert ask("красный круг!")[1].startswith("outputs  2 made now")
    assert ask("красный круг", "--guidance-scale", 3)[1].startswith("outputs  2 made now")
    found = clips_in("outputs")
    assert found.items() >= first.items()
    assert found.keys() == {f"красный-круг-{seed}{more}.png" for seed in (1, 2) for more in ("", "-2", "-3")}
    assert ask("красный круг", "--guidance-scale", 3)[1].startswith("outputs  0 made now")
    assert clips_in("outputs") == found
