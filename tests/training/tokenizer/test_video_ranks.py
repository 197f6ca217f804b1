"""The video tokenizer's training in several processes, which share the clips of a step, has the losses of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import Ranks
from run_log import read_log
from small_training import small

from lumos.training.tokenizer.task import train
from tokenizer import VideoTokenizer

pytestmark = pytest.mark.slow


def finish(ranks: Ranks, settings, world: int = 2, faults: dict | None = None) -> Path:
    for process in ranks.run("train-tokenizer", settings.to_dict(), world, faults=faults):
        assert process.code == 0, process.err
    return Path(settings.output_dir)


@pytest.mark.parametrize(("muon_lr", "zero_stage"), [(0.01, None), (0.0, 2)])
def test_two_processes_train_as_one_and_go_on_after_a_kill(ranks: Ranks, tmp_path: Path, muon_lr, zero_stage):
    options = {
        "batch_size": 3, "pictures_per_batch": 3, "micro_batch_size": 2, "muon_lr": muon_lr, "ema_decay": 0.9, "steps": 5,
        "log_every": 1, "checkpoint_minutes": 1e-6, "validate_every": 3, "export_dtype": "float32", "device": "cpu",
        "share_worlds": 0.5, "share_textures": 1.0,
    }  # fmt: skip
    train(plain := small(tmp_path / "plain", **options))
    spread = small(tmp_path / "spread", zero_stage=zero_stage, **options)
    ended = ranks.run("train-tokenizer", spread.to_dict(), 2, faults={1: [["kill_after_step", 3]]})
    assert [process.code for process in ended] == [1, -9], ended
    finish(ranks, spread)
    for key in ("loss", "grad_norm", "psnr_worlds", "psnr_photographs"):
        assert read_log(spread.output_dir, key) == pytest.approx(read_log(plain.output_dir, key), rel=1e-3), key
    assert (tmp_path / "spread" / "samples" / "worlds-000003.png").is_file()
    VideoTokenizer.from_pretrained(tmp_path / "spread")


def test_a_run_goes_on_with_another_number_of_processes(ranks: Ranks, tmp_path: Path):
    options = {"batch_size": 2, "pictures_per_batch": 2, "muon_lr": 0.01, "log_every": 1, "device": "cpu"}
    train(plain := small(tmp_path / "plain", **options))
    spread = small(tmp_path / "spread", **options)
    ended = ranks.run("train-tokenizer", spread.to_dict(), 2, faults={0: [["signal_after_step", 3]]})
    assert [process.code for process in ended] == [0, 0], ended
    assert train(spread)["export"]
    assert read_log(spread.output_dir) == pytest.approx(read_log(plain.output_dir), rel=1e-3)


def test_muon_and_cut_matrices(ranks: Ranks, tmp_path: Path):
    settings = small(tmp_path / "run", batch_size=2, pictures_per_batch=2, muon_lr=0.01).to_dict() | {"zero_stage": 1}
    for process in ranks.run("train-tokenizer", settings, 2):
        assert (process.code, "zero_stage 1 is not possible: allowed is null or 0 with muon_lr" in process.err) == (2, True)
    assert not (tmp_path / "run").exists()
