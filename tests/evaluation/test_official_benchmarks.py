"""`evaluate vbench`, `vbench-i2v` and `geneval` as a user types them, with a micro model."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lumos.cli import main
from lumos.video.io import read_image, read_video

PROMPTS = [
    {"prompt_en": "a red circle moves left", "dimension": ["color"]},
    {"prompt_en": "a small blue square grows", "dimension": ["temporal_flickering"]},
    {"prompt_en": "the digit 7 moves up", "dimension": ["scene", "background_consistency"]},
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Path("list.json").write_text(json.dumps(PROMPTS))


@pytest.fixture
def evaluate(micro_folder, capsys):
    """Runs `evaluate NAME --model micro ...`; returns (exit code, last line of stdout as JSON, lines of stderr)."""

    def call(*args):
        capsys.readouterr()
        code = main(["evaluate", args[0], "--json", "--model", str(micro_folder), *map(str, args[1:])])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else None, err.splitlines()

    return call


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_vbench_finds_every_clip_by_its_own_rule(evaluate):
    code, summary, _ = evaluate("vbench", "--prompts", "list.json", "--out", "out")
    assert code == 0
    assert (summary["files"], summary["made"], summary["missing"]) == (35, 35, 0)
    names = os.listdir("out/videos")
    suffix = Path(names[0]).suffix  # VBench takes that of whichever file comes first
    for row, count in zip(PROMPTS, (5, 25, 5), strict=True):
        assert all(f"{row['prompt_en']}-{i}{suffix}" in names for i in range(count))
    assert len(names) == 35
    assert sorted(os.listdir("out")) == ["manifest.json", "videos"]


def test_the_manifest_tells_how_each_clip_was_made(evaluate, micro_folder):
    evaluate("vbench", "--prompts", "list.json", "--out", "out", "--samples", 2, "--guidance-scale", 1.5, "--seed", 7)
    manifest = json.loads(Path("out/manifest.json").read_text())
    inputs = manifest["inputs"]
    assert inputs["settings"]["guidance_scale"] == 1.5
    assert inputs["settings"]["num_inference_steps"] == 2  # the model's own default
    assert inputs["settings"]["num_frames"] == 5
    assert (inputs["seed"], inputs["benchmark"], len(inputs["seeds"])) == (7, "vbench", 6)
    assert len(inputs["model_sha256"]["model"]) == len(inputs["prompts_sha256"]) == 64
    assert {"torch", "lumos"} <= manifest["environment"]["versions"].keys()
    for file, seed in list(inputs["seeds"].items())[::3]:
        prompt = file.rsplit("-", 1)[0]
        assert main(["generate", "--model", str(micro_folder), "--prompt", prompt, "--seed", str(seed), "--guidance-scale", "1.5",
                     "--output", "alone.mp4"]) == 0  # fmt: skip
        np.testing.assert_array_equal(read_video("alone.mp4")[0], read_video(f"out/videos/{file}")[0])


@pytest.mark.slow
def test_shards_by_hand_make_the_files_of_one_run(evaluate):
    rest = ("--prompts", "list.json", "--samples", 5, "--batch-size", 2)
    evaluate("vbench", *rest, "--out", "whole")
    made = [evaluate("vbench", *rest, "--out", "parts", "--shard", f"{k}/3")[1]["made"] for k in (3, 1, 2)]
    assert sum(made) == 15
    assert min(made) > 0
    assert contents("parts") == contents("whole")
    assert evaluate("vbench", *rest, "--out", "whole")[1]["made"] == 0


@pytest.mark.slow
def test_torchrun_shares_the_work(evaluate, micro_folder, repo, forks):
    """`forks.launch` sets the variables of torchrun, as a test in test_list_stops.py shows."""
    rest = ["--prompts", "list.json", "--samples", "2", "--batch-size", "2"]
    evaluate("vbench", *rest, "--out", "whole")
    command = ["-m", "lumos", "evaluate", "vbench", "--json", "--model", micro_folder, *rest, "--out", "parts"]
    runs = forks.launch(command, env={**os.environ, "PYTHONPATH": str(repo)})
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr[-2000:]
    shards = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
    assert sorted((s["shard"], s["made"]) for s in shards) == [("1/2", 4), ("2/2", 2)]
    assert contents("parts") == contents("whole")


@pytest.mark.slow
def test_a_killed_run_goes_on(evaluate, micro_folder, repo, forks):
    rest = ["--prompts", "list.json", "--samples", "12", "--batch-size", "3"]
    command = ["-m", "lumos", "evaluate", "vbench", "--model", micro_folder, *rest, "--out", "out"]
    run = forks.start(command, env={**os.environ, "PYTHONPATH": str(repo)})
    videos = Path("out/videos")
    while run.poll() is None and not (videos.is_dir() and len(list(videos.iterdir())) >= 4):
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    before = contents(videos)
    assert 4 <= len(before) < 36
    code, summary, _ = evaluate("vbench", *rest, "--out", "out")
    assert (code, summary["made"], summary["missing"]) == (0, 36 - len(before), 0)
    evaluate("vbench", *rest, "--out", "whole")
    assert contents("out") == contents("whole")
    assert before.items() <= contents(videos).items()


@pytest.mark.slow
def test_a_folder_holds_results_of_one_kind(evaluate, micro_folder):
    first = ("vbench", "--prompts", "list.json", "--samples", 1, "--out", "out")
    evaluate(*first)
    before = contents("out")
    for other, message in (
        (("--seed", 1), "seed was 0, now 1"),
        (("--num-inference-steps", 3), "settings.num_inference_steps was 2, now 3"),
        (("--dtype", "bfloat16"), "dtype was float32, now bfloat16"),
        (("--samples", 2), "seeds."),
        (("--batch-size", 2), "batch_size was 5, now 2"),
    ):
        code, _, err = evaluate(*first, *other)
        assert code == 2
        assert "out was begun with other inputs" in err[-1]
        assert message in err[-1]
    Path("list.json").write_text(json.dumps(PROMPTS, indent=1))
    assert "prompts_sha256 was" in evaluate(*first)[2][-1]
    assert contents("out") == before


def test_the_model_reads_captions_and_prompts_name_the_files(evaluate):
    told = ["a red circle moves left on a gray background", "a small blue square grows", "the digit 7 moves up"]
    Path("long.txt").write_text("\n".join(told) + "\n")
    evaluate("vbench", "--prompts", "list.json", "--samples", 1, "--captions", "long.txt", "--out", "told")
    with av.open("told/videos/a red circle moves left-0.mp4") as container:
        assert json.loads(container.metadata["comment"])["prompt"] == told[0]
    assert len(json.loads(Path("told/manifest.json").read_text())["inputs"]["captions_sha256"]) == 64
    evaluate("vbench", "--prompts", "list.json", "--samples", 1, "--out", "plain")
    told, plain = (read_video(f"{out}/videos/a red circle moves left-0.mp4")[0] for out in ("told", "plain"))
    assert (told != plain).any()


def test_geneval_reads_the_folders_by_its_own_rule(evaluate, repo):
    path = repo / "configs/evaluation/geneval.jsonl"
    code, summary, err = evaluate("geneval", "--prompts", path, "--out", "out", "--samples", 3)
    assert (code, summary["made"], summary["missing"]) == (0, 18, 0)
    assert not any("no effect" in line for line in err)
    found = {}
    for name in sorted(os.listdir("out/images")):
        assert name.isdigit()
        folder = Path("out/images", name)
        samples = [sample for sample in os.listdir(folder / "samples") if re.match(r"\d+\.png", sample)]
        found[name] = (json.loads((folder / "metadata.jsonl").read_text()), sorted(samples))
    lines = path.read_text().splitlines()
    assert found == {f"{n:05d}": (json.loads(line), ["0000.png", "0001.png", "0002.png"]) for n, line in enumerate(lines)}
    assert read_image("out/images/00003/samples/0001.png").shape == (16, 24, 3)
    assert json.loads(Path("out/manifest.json").read_text())["inputs"]["settings"]["fps"] == 1
    whole = contents("out")
    for k in (1, 2):
        evaluate("geneval", "--prompts", path, "--out", "parts", "--samples", 3, "--shard", f"{k}/2")
    assert contents("parts") == whole


def test_vbench_i2v_begins_with_the_picture_of_each_entry(evaluate, micro_folder):
    Path("pictures").mkdir()
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (48, 32), colour).save(f"pictures/{name}.jpg")
    prompts = ("a red circle", "a blue circle, still")
    rows = [{"prompt_en": prompt, "dimension": [], "image_name": f"{prompt.split()[1]}.jpg"} for prompt in prompts]
    Path("i2v.json").write_text(json.dumps(rows))
    args = ("vbench-i2v", "--prompts", "i2v.json", "--images", "pictures", "--samples", 2, "--out")
    code, summary, _ = evaluate(*args, "out")
    assert (code, summary["made"]) == (0, 4)
    manifest = json.loads(Path("out/manifest.json").read_text())["inputs"]
    assert len(manifest["images_sha256"]) == 64
    for file in ("a red circle-1.mp4", "a blue circle, still-0.mp4"):
        picture = f"pictures/{file.split()[1]}.jpg"
        assert main(["generate", "--model", str(micro_folder), "--prompt", file.rsplit("-", 1)[0], "--image", picture, "--seed",
                     str(manifest["seeds"][file]), "--output", "alone.mp4"]) == 0  # fmt: skip
        np.testing.assert_array_equal(read_video("alone.mp4")[0], read_video(f"out/videos/{file}")[0])
    Image.new("RGB", (48, 32)).save("pictures/red.jpg")
    assert "images_sha256 was" in evaluate(*args, "out")[2][-1]
    Path("pictures/red.jpg").unlink()
    code, _, err = evaluate(*args, "other")
    assert code == 2
    assert err == ["error: 1 of 2 pictures are missing, pictures/red.jpg first; --images names their folder"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["vbench"], "--prompts, --out missing; give --prompts and --out"),
        (["vbench", "--prompts", "list.json"], "--out missing"),
        (["vbench-i2v", "--prompts", "list.json", "--out", "out"], "--images missing"),
        (["vbench", "--prompts", "list.json", "--out", "out", "--batch-size", "0"], "--batch-size 0 is not allowed"),
        (["vbench", "--prompts", "list.json", "--out", "out", "--samples", "0"], "samples 0 is not allowed"),
        (["vbench", "--prompts", "list.json", "--out", "out", "--shard", "3/2"], "shard '3/2' is not allowed"),
        (["vbench", "--prompts", "list.json", "--out", "out", "--num-frames", "6"], "num_frames 6 is not allowed"),
        (["vbench", "--prompts", "list.json", "--out", "out", "--guidance-scale", "0"], "guidance_scale 0.0 is not allowed"),
        (["geneval", "--prompts", "list.json", "--out", "out", "--fps", "8"], "unrecognized arguments: --fps 8"),
        (["geneval", "--prompts", "list.json", "--out", "out"], "line 1 is not valid JSON|entry 0 of the prompt list has no tag"),
        (["vbench", "--prompts", "list.json", "--out", "list.json"], "list.json"),
    ],
)
def test_impossible_requests_are_refused(evaluate, args, message):
    code, _, err = evaluate(*args)
    assert code in (1, 2)
    assert re.search(message, err[-1])
    assert not Path("out").exists()


def test_a_too_long_caption_is_refused_before_any_clip(evaluate):
    told = [row["prompt_en"] for row in PROMPTS]
    Path("long.txt").write_text("\n".join([*told[:2], told[2] * 200]))
    code, _, err = evaluate("vbench", "--prompts", "list.json", "--out", "out", "--captions", "long.txt")
    assert code == 2
    assert "this model reads at most 256" in err[-1]
    assert not Path("out").exists()
