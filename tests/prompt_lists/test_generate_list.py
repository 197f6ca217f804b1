"""Lists of clips on the command line: results, errors, and resuming after every kind of stop."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lumos import LumosPipeline
from lumos.cli import main
from lumos.errors import RunError
from lumos.models.lumos1.sampling import generate_frames
from lumos.pipeline import request as pipeline_request
from lumos.prompt_lists import clips, results
from lumos.prompt_lists.clips import Recorded
from lumos.prompt_lists.results import only_shard
from lumos.video.io import read_image, read_video, write_video

BAR = re.compile(r"clip/s|s/clip|\| frame ")  # a progress bar; a slow one shows seconds a clip


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def generate(micro_folder, capsys):
    """Runs `generate --model micro ...`; returns (exit code, last line of stdout, lines of stderr without progress bars)."""

    def call(*args):
        capsys.readouterr()
        code = main(["generate", "--model", str(micro_folder), *map(str, args)])
        out, err = capsys.readouterr()
        lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and not BAR.search(line)]
        return code, out.splitlines()[-1] if out else "", lines

    return call


def write_list(*rows, name="list.jsonl"):
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return name


def clips_in(folder):
    """Return the bytes of the clips by name. Records hold times, so they differ from run to run."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.suffix != ".json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def command(micro_folder, *args):
    return [sys.executable, "-m", "lumos", "generate", "--model", str(micro_folder), *map(str, args)]


def environment(repo):
    return {**os.environ, "PYTHONPATH": str(repo), "OMP_NUM_THREADS": str(torch.get_num_threads())}


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


def test_a_killed_batch_goes_on(generate, micro_folder, repo, forks):
    args = ("--prompts", write_list(*({"prompt": f"x {n}"} for n in range(24))), "--batch-size", 3, "--output-dir")
    run = forks.start(command(micro_folder, *args, "out")[1:], env=environment(repo))
    while run.poll() is None and len(list(Path("out").glob("*.mp4"))) < 4:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    before = clips_in("out").keys()
    assert 4 <= len([name for name in before if "/" not in name]) < 24
    code, out, err = generate(*args, "out")
    assert (code, err) == (0, []) or "made with other inputs" in err[0]  # killed between a clip and its record
    assert 0 < int(re.search(r"(\d+) made now", out)[1]) < 24
    generate(*args, "whole")
    assert clips_in("out") == clips_in("whole")
    assert len(clips_in("out")) == 24
    assert not Path("out/.unfinished").exists()


def test_ctrl_c_in_a_batch_keeps_what_is_done(generate, micro_folder, repo, forks):
    args = ("--prompts", write_list(*({"prompt": f"x {n}"} for n in range(24))), "--batch-size", 2, "--output-dir", "out")
    run = forks.start(command(micro_folder, *args)[1:], env=environment(repo))
    while run.poll() is None and len(list(Path("out").glob("*.mp4.json"))) < 3:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    code, err = run.wait(60), run.stderr
    assert code == 1, err[-500:]
    done = len(list(Path("out").glob("*.mp4.json")))
    assert f"error: interrupted; {done} of 24 clips are in out; the same command makes the others" in err
    assert "Traceback" not in err
    assert not Path("out/.unfinished").exists()
    assert generate(*args)[:2] == (0, f"out  {24 - done} made now  24 clips in all  24 rows")


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_done(generate):
    """A write fails half-way, because a limit of the file size is below the size of the long clip."""
    rows = [{"prompt": "x", "output": "a.mp4"}, {"prompt": "x", "num_frames": 97, "height": 64, "width": 64, "output": "b.mp4"}]
    args = ("--prompts", write_list(*rows), "--output-dir", "out", "--num-inference-steps", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        code, _, err = generate(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert re.fullmatch(r"error: cannot write .*File too large.*check free space.*", err[-1])
    assert sorted(str(p.relative_to("out")) for p in Path("out").rglob("*")) == ["a.mp4", "a.mp4.json"]
    assert generate(*args)[:2] == (0, "out  1 made now  2 clips in all  2 rows")


def test_a_clip_without_memory_is_reported_and_others_made(generate, monkeypatch):
    def full(model, rows, *args, new_frames, **options):
        if new_frames > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return generate_frames(model, rows, *args, new_frames=new_frames, **options)

    monkeypatch.setattr("lumos.models.lumos1.pipeline.generate_frames", full)
    rows = [{"prompt": "x", "num_frames": 33}, {"prompt": "y", "num_frames": 33}, {"prompt": "z"}]
    code, out, err = generate("--prompts", write_list(*rows), "--output-dir", "out")
    assert (code, out) == (1, "out  1 made now  3 clips in all  3 rows")
    assert err[0].startswith("list.jsonl line 1, list.jsonl line 2: out of memory (CUDA out of memory")
    assert "--batch-size 1 needs" in err[0]
    assert err[-1] == "error: 2 clips could not be made, as said above; the other clips are in out"
    assert list(clips_in("out")) == ["0003-z.mp4"]
    assert not Path("out/.unfinished").exists()


@pytest.mark.parametrize("lost", ["a batch that is not made", "a row without a clip", "a batch that is not planned"])
def test_clips_that_get_lost_are_an_error(generate, monkeypatch, lost):
    if lost == "a batch that is not made":
        make = results.render
        first = lambda results, batches, *a: 2 if batches[0][0].line == 1 else make(results, batches, *a)  # noqa: E731
        monkeypatch.setattr("lumos.prompt_lists.results.render", first)
    elif lost == "a row without a clip":
        clips_of = clips.clips_of
        keep = lambda row, *a, **k: [] if row.line == 1 else clips_of(row, *a, **k)  # noqa: E731
        monkeypatch.setattr("lumos.prompt_lists.clips.clips_of", keep)
    else:
        batches_of = clips.batches_of
        monkeypatch.setattr("lumos.prompt_lists.clips.batches_of", lambda *a: batches_of(*a)[1:])
    rows = [{"prompt": "x"}, {"prompt": "y"}, {"prompt": "z"}]
    code, _, err = generate("--prompts", write_list(*rows), "--output-dir", "out", "--batch-size", 1)
    assert code == 1
    if lost == "a row without a clip":
        assert err == [
            "list.jsonl line 1: the row asks for no clip",
            "error: 1 of 3 rows are bad, as said above; the other clips are in out",
        ]
    else:
        assert err[-1].startswith("error: 1 of 3 files that were to be made are not in out, '0001-x.mp4' first; run the same")
    assert list(clips_in("out")) == ["0002-y.mp4", "0003-z.mp4"]


def test_a_deleted_picture_fails_its_own_clip_only(generate, monkeypatch):
    Image.new("RGB", (24, 16), "red").save("a.png")
    Image.new("RGB", (24, 16), "blue").save("b.png")
    check = Recorded.stale

    def stale(results, files):  # after the rows were checked, before the first batch
        Path("b.png").unlink()
        return check(results, files)

    monkeypatch.setattr("lumos.prompt_lists.clips.Recorded.stale", stale)
    rows = [{"prompt": "x", "image": "a.png"}, {"prompt": "y", "image": "b.png"}, {"prompt": "z", "image": "a.png"}]
    code, out, err = generate("--prompts", write_list(*rows), "--output-dir", "out")
    assert (code, out) == (1, "out  2 made now  3 clips in all  3 rows")
    assert re.match(r"list\.jsonl line 2: .*b\.png", err[0])
    assert err[-1] == "error: 1 clips could not be made, as said above; the other clips are in out"
    assert list(clips_in("out")) == ["0001-x.mp4", "0003-z.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["by hand", "torchrun", "--local_rank", pytest.param("deepspeed", marks=pytest.mark.thorough)])
def test_shares_make_what_one_process_makes(generate, micro_folder, repo, forks, launcher):
    """A bad row does not stop the others; the exit code reports it to the launcher when all clips are made.

    torchrun is forked, and starts two processes itself. The deepspeed launcher sets its variables and adds --local_rank; a test of
    training in test_deepspeed.py starts it.
    """
    rows = [{"prompt": f"x {n}", "num_frames": 9 if n % 3 else 5} for n in range(5)]
    args = ("--prompts", write_list(*rows, "bad"), "--batch-size", 2, "--output-dir")
    assert generate(*args, "whole")[0] == 1
    if launcher == "by hand":
        done = [generate(*args, "parts", "--shard", f"{part}/3") for part in (3, 1, 2)]
        assert [code for code, _, _ in done] == [1, 1, 1]
        # each has its own terminal
        assert all(err[0].startswith("list.jsonl line 6: the row is not valid JSON") for _, _, err in done)
        assert sum(int(re.search(r"(\d+) made now", out)[1]) for _, out, _ in done) == 5
    elif launcher == "--local_rank":
        _, _, _, _, *rest = command(micro_folder, *args, "parts")
        runs = forks.launch([repo / "generate.py", *rest], env=environment(repo), rank_option=launcher)
        assert [run.returncode for run in runs] == [1, 1], runs[0].stderr[-2000:]
        assert sum(run.stderr.count("list.jsonl line 6: the row is not valid JSON") for run in runs) == 1
        assert "parts  5 made now  5 clips in all  6 rows" in runs[0].stdout
    else:
        python, _, _, _, *rest = command(micro_folder, *args, "parts")
        program = [str(repo / "generate.py"), *rest]
        if launcher == "deepspeed":
            pytest.importorskip("deepspeed")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            started = [str(Path(python).parent / "deepspeed"), "--num_gpus", "2", "--master_port", port, *program]
            done = subprocess.run(started, capture_output=True, text=True, env=environment(repo) | {"DS_ACCELERATOR": "cpu"})
        else:
            started = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *program]
            done = forks.run(started, env=environment(repo))
        assert done.returncode == 1
        assert done.stderr.count("list.jsonl line 6: the row is not valid JSON") == 1
        assert "parts  5 made now  5 clips in all  6 rows" in done.stdout
    assert clips_in("parts") == clips_in("whole")
    assert not Path("parts/.unfinished").exists()


def test_files_of_others_stay_in_the_folder(generate):
    """A user's own folder and the files of a process with another share stay, whatever their names."""
    own, others = Path("out/unfinished/mine.txt"), Path("out/.unfinished/2-of-3/half.mp4")
    for path in (own, others):
        path.parent.mkdir(parents=True)
        path.touch()
    with only_shard(Path("out"), (2, 3)):
        assert generate("--prompts", write_list({"prompt": "x"}), "--output-dir", "out")[0] == 0
        assert own.exists()
        assert others.exists()
    assert generate("--prompts", "list.jsonl", "--output-dir", "out")[:2] == (0, "out  0 made now  1 clips in all  1 rows")
    assert not Path("out/.unfinished").exists()


def test_a_clip_that_was_cut_is_made_again(generate):
    args = ("--prompts", write_list({"prompt": "x", "output": "x.mp4"}), "--output-dir", "out")
    assert generate(*args)[0] == 0
    whole = Path("out/x.mp4").read_bytes()
    Path("out/x.mp4").write_bytes(whole[:99])
    assert generate(*args)[1] == "out  1 made now  1 clips in all  1 rows"
    assert Path("out/x.mp4").read_bytes() == whole


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


def test_a_launcher_needs_clips_to_share_and_a_seed(generate, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "a launcher started 2 processes for one clip" in generate("--prompt", "x")[2][0]
    assert "several processes need one --seed" in generate("--prompt", "x", "--num-videos-per-prompt", 4)[2][0]
    assert generate("--prompt", "x", "--local_rank=0")[0] == 2  # not because of --local_rank, which deepspeed adds


def test_a_second_process_on_the_same_share_is_refused(generate):
    with only_shard(Path("out"), (1, 1)):
        code, _, err = generate("--prompts", write_list({"prompt": "x"}), "--output-dir", "out")
        assert code == 1
        assert "another process with share 1 of 1 is writing into" in err[-1]
        assert generate("--prompts", "list.jsonl", "--output-dir", "out", "--shard", "1/2")[0] == 0
    with pytest.raises(RunError), only_shard(Path("out"), (1, 1)), only_shard(Path("out"), (1, 1)):
        pass
    assert not Path("out/.unfinished").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "output": "../a.mp4"}, "output '../a.mp4' is not allowed; name a file in the folder of results"),
        ({"prompt": "x", "output": "/tmp/a.mp4"}, "is not allowed"),
        ({"prompt": "x", "output": ".unfinished/a.mp4"}, "is not allowed"),
        ({"prompt": "x", "output": "a.avi"}, "use one of .mp4"),
        ({"prompt": "x", "output": "a.png"}, "would be a folder of 5 pictures; name a .mp4"),
        ({"prompt": "x", "output": "a.gif", "fps": 60}, "(gif: 50)"),
        ({"prompt": "x", "output": "Good.mp4"}, "Good.mp4 is written by line 1 too"),
        ({"prompt": "x", "seed": [1, 1]}, "is written by line 2 too"),
        ({"prompt": "x", "seed": []}, "seed [] is not allowed; give a whole number, or a list of them"),
        ({"prompt": "x", "num_videos_per_prompt": 10**8}, "num_videos_per_prompt 100000000 is not allowed"),
        ({"prompt": "word " * 5000}, "this model reads at most 256"),
        ({"prompt": "x", "guidance_scale": 0}, "guidance_scale 0 is not allowed"),
        ({"prompt": "x", "height": 65}, "height 65 is not a multiple of 8"),
        ({"prompt": "x", "width": 2000, "height": 8}, "width 2000 is too large for this model; allowed: 8 to"),
        ({"prompt": "x", "output": "y" * 248 + ".mp4"}, ".mp4.json: File name too long"),
        ({"prompt": "x", "output": "y" * 300 + ".mp4"}, "File name too long"),
        ({"prompt": "x", "output": "good.mp4/b.mp4"}, "would lie in good.mp4, which is a clip"),
        ({"prompt": "x", "seed": -1}, "seed -1 is not allowed"),
        ({"prompt": "x", "image": "a.png", "video": "b.mp4"}, "both image and video are given"),
        ({"prompt": ["x", "y"], "prompt_frames": [6, 3]}, "prompt_frames [6, 3] is not allowed"),
        ({"prompt": "x", "num_frames": 4001, "fps": 60}, "this model was made for at most 8192"),
    ],
)
def test_a_bad_row_is_told_before_any_work(generate, monkeypatch, row, message):
    monkeypatch.setattr("lumos.models.lumos1.pipeline.generate_frames", lambda *a, **k: pytest.fail("the model ran"))
    monkeypatch.setattr("lumos.commands.generate_list.make_clips", lambda *a: (1, 0))
    code, _, err = generate("--prompts", write_list({"prompt": "x", "output": "good.mp4"}, row), "--output-dir", "out")
    assert code == 1
    assert len(err) == 2
    assert err[0].startswith("list.jsonl line 2: ")
    assert message in err[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompts", "list.txt", "--output", "a.mp4"], "--output has no effect on several clips"),
        (["--prompts", "list.txt", "--preview", "a.mp4"], "--preview has no effect on several clips"),
        (["--prompts", "list.txt", "--seed", "1", "2"], "gives 2 seeds for a list"),
        (["--prompts", "list.txt", "--batch-size", "0"], "--batch-size 0 is not allowed"),
        (["--prompts", "list.txt", "--num-videos-per-prompt", "0"], "--num-videos-per-prompt 0 is not allowed"),
        (["--prompts", "list.txt", "--shard", "3/2"], "shard '3/2' is not allowed"),
        (["--prompts", "list.txt", "--prompt", "x"], "not allowed with argument"),
        (["--prompts", "nowhere.txt"], "cannot read nowhere.txt as a list of prompts"),
        (["--prompt", "x", "--seed", "1", "-2"], "seed -2 is not allowed"),
        (["--prompt", "x", "--seed", "1", "2", "--num-frames", "6"], "num_frames 6 is not allowed"),
        (["--prompt", "x", "--seed", "1", "2", "--num-videos-per-prompt", "3"], "seed is a list of 2, but there are 3 clips"),
        (["--prompt", " ", "--seed", "1", "2"], "the prompt is empty"),
        (["--prompt", "x", "--num-videos-per-prompt", "0"], "--num-videos-per-prompt 0 is not allowed"),
        (["--prompt", "x", "--num-videos-per-prompt", "2", "--shard", "1/2"], "several processes need one --seed to agree on"),
        (["--prompt", "x", "--seed", "1", "1"], "x-1.mp4 is written by another --seed 1 too"),
    ],
)
def test_wrong_options_are_one_line_and_make_nothing(generate, args, message):
    Path("list.txt").write_text("x\n")
    code, _, err = generate(*args, "--output-dir", "out")
    assert code == 2
    assert len(err) == 1
    assert message in err[0]
    assert not Path("out").exists()


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
