"""Lists of clips after a stop or a failure, and shared by processes: what is done stays, and the rest is made."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from list_folder import clips_in, command, environment, write_list
from PIL import Image

from lumos.errors import RunError
from lumos.models.lumos1.sampling import generate_frames
from lumos.prompt_lists import clips, results
from lumos.prompt_lists.clips import Recorded
from lumos.prompt_lists.results import only_shard

PROGRAM = """
import os, pathlib, sys, time
rank, half = os.environ["RANK"], pathlib.Path(__file__).with_suffix("." + os.environ["RANK"])
half.write_text(" ".join(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
half.rename(half.with_name(rank))
while rank == "1" and not half.with_name("0").exists():  # a launcher ends the others when one fails
    time.sleep(0.01)
sys.exit(rank == "1" and os.environ["MASTER_PORT"].isdecimal() and os.environ["MASTER_ADDR"] != "")
"""


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
@pytest.mark.parametrize("launcher", [
    "by hand", "--local_rank", *(pytest.param(launcher, marks=pytest.mark.thorough) for launcher in ("torchrun", "deepspeed"))
])  # fmt: skip
def test_shares_make_what_one_process_makes(generate, micro_folder, repo, forks, launcher):
    """A bad row does not stop the others; the exit code reports it to the launcher when all clips are made.

    The deepspeed launcher sets the variables of torchrun and adds --local_rank, as `forks.launch` does here. The next test starts
    torchrun, and a test of training in test_deepspeed.py the deepspeed launcher.
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


def test_torchrun_sets_what_the_shares_are_made_of(forks, tmp_path):
    """torchrun gives two processes the variables that `forks.launch` gives them, and passes on that one has failed."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert forks.run([*launcher, program]).returncode == 1
    told = [(tmp_path / rank).read_text() for rank in "01"]
    for rank in "01":
        (tmp_path / rank).unlink()
    assert [run.returncode for run in forks.launch([program], env={**os.environ})] == [0, 1]
    assert told == [(tmp_path / rank).read_text() for rank in "01"] == ["0 0 2", "1 1 2"]


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
