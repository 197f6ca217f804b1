"""Trainings, lists of clips and saves that are killed at random moments and at chosen file calls lose nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import Ranks

from lumos import LumosPipeline
from lumos.cli import main
from lumos.commands import bench_faults as faults


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["training", "list"])
def test_kills_change_no_loss_and_lose_nothing(forks, times, kind):
    """Half of the kills are at random moments, half at random file calls. Trainings draw their clips in another process."""
    kills = times(3, 20)
    done = forks.run(["-m", "lumos", "bench", "faults", "--json", "--kills", kills, "--minutes", 60, "--kinds", kind], timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["kills"], result["differing_losses"], result["lost_items"], result["failed_runs"]) == (kills, 0, 0, 0)
    assert result["kills_of_each"] == {kind: kills}


@pytest.mark.slow
def test_one_of_two_processes_killed_at_file_calls(ranks: Ranks, material: Path, tmp_path: Path, times):
    """Kills with DeepSpeed and with data processes: during the save of each process, and when the first one renames it."""
    whole = faults.training_settings(material, tmp_path / "whole")
    ranks.finish(whole, "zero2")
    settings = faults.training_settings(material, tmp_path / "killed")
    for victim, step, call in ((1, 2, 1), (0, 2, 8), (0, 2, 3), (1, 4, 1))[: times(2, 4)]:
        faults_of = {victim: [["kill_at_file_call_after_step", step, call]]}
        ended = ranks.train(settings, "zero2", 2, faults_of, seconds=300)
        assert ended[victim].code == -9, ended[victim].err
        assert ended[1 - victim].code == 1, ended[1 - victim].err
    ranks.finish(settings, "zero2")
    assert faults.compare_training(settings.output_dir, whole.output_dir) == ([], [])


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_killed_save_leaves_the_old_or_the_new_pipeline(micro_folder: Path, tmp_path: Path, times):
    pipe = LumosPipeline.from_pretrained(micro_folder, device="cpu")
    folder = tmp_path / "model"
    pipe.save_pretrained(folder)
    old = content(folder)
    with torch.no_grad():
        pipe.model.lm_head.weight.add_(1)
    pipe.save_pretrained(tmp_path / "new")
    new, found, step = content(tmp_path / "new"), [], times(3, 1)
    assert old.keys() == new.keys()
    for call in range(1, 200, step):
        code = faults.forked(lambda: pipe.save_pretrained(folder), tmp_path / "child", faults.SECONDS, call)
        found.append(content(folder))
        assert found[-1] in (old, new), call
        if code == 0:
            break
        assert code == -9, faults.told(tmp_path / "child")
    assert len(found) > 10 // step
    assert {path.name for path in tmp_path.iterdir()} == {"model", "new", "child.messages"}


def test_bench_faults_reports_what_differs(material: Path, tmp_path: Path, capsys):
    """The comparison sees a lost line, a changed loss, an absent export and a file that is half written."""
    for name in ("whole", "out"):
        (tmp_path / name / "export").mkdir(parents=True)
        (tmp_path / name / "export" / "model.safetensors").write_text("weights")
        lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "grad_norm": 1.0}]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert faults.compare_training(tmp_path / "out", tmp_path / "whole") == ([], [])
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 2, "loss": 1.25}\n')
    (tmp_path / "out" / "export" / "model.safetensors").unlink()
    (tmp_path / "out" / ".log.jsonl.1.part").touch()
    differ, lost = faults.compare_training(tmp_path / "out", tmp_path / "whole")
    assert (differ, lost) == (["loss of step 2"], ["loss of step 1", "grad_norm of step 2", "export", ".log.jsonl.1.part"])
    for option in (["--minutes", "0"], ["--minutes", "nan"], ["--kills", "0"], ["--kinds", "naps"]):
        assert main(["bench", "faults", *option]) == 2
        assert "error:" in capsys.readouterr().err
