"""Options of lists of clips on Ray, and what a task returns; lists run on a real Ray in test_ray_engine.py."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import pytest
import torch

from lumos.cli import main
from lumos.commands import generate, generate_ray
from lumos.commands.generate_list import make_share


@pytest.mark.parametrize("quiet", [False, True])
def test_a_share_returns_its_messages_with_their_levels(micro_folder, tmp_path, monkeypatch, capsys, quiet):
    """A task of Ray returns notes and errors separately, so that --quiet hides only the notes."""
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    words = ["--model", str(micro_folder), "--prompts", "list.csv", "--device", "cpu", "--output-dir", "out"]
    values = {**vars(parser.parse_args(words)), "threads": 3, "own_process": False, "quiet": quiet}
    seen, before = [], torch.get_num_threads()

    def watched(*given, **more):
        seen.append(torch.get_num_threads())
        return make_share(*given, **more)

    monkeypatch.setattr(generate_ray, "make_share", watched)
    for prompt in ("x", "y"):  # the second time, the file is there with another prompt, which gives a note
        Path("list.csv").write_text(f"prompt,seed,num_frames,output\n{prompt},1,1,a.png\nbad,5,6,\n")
        answer = generate_ray.share_in_task(values, 1, 1, str(tmp_path))
    levels = [level for level, _ in answer["said"]]
    assert answer["share"]["bad_rows"] == 1, answer
    assert logging.ERROR in levels
    assert (logging.WARNING in levels) != quiet, answer
    assert capsys.readouterr().err == ""
    assert (seen, torch.get_num_threads()) == ([3, 3], before)  # OMP_NUM_THREADS of the machine does not count in a task


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "list.txt", "--engine", "ray", "--shard", "1/2"], "--engine ray makes the shares itself"),
        (["--prompts", "list.txt", "--workers", "2"], "--workers has no effect without --engine ray"),
        (["--prompts", "list.txt", "--engine", "ray", "--workers", "0"], "--workers 0 is not allowed; give at least 1"),
        (["--prompts", "list.txt", "--engine", "ray", "--device", "mps"], "which assigns the GPUs"),
        (["--prompt", "x", "--num-videos-per-prompt", "2", "--engine", "ray"], "several processes need one --seed"),
        (["--prompt", "x", "--engine", "ray"], "--engine has no effect on a single clip"),
    ],
)
def test_options_that_do_not_fit(tmp_path, monkeypatch, capsys, words, message):
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("x\n")
    assert main(["generate", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_ray_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    Path("list.txt").write_text("x\n")
    assert main(["generate", "--prompts", "list.txt", "--engine", "ray"]) == 2
    assert "pip install 'lumos-video[ray]'" in capsys.readouterr().err
