"""Distillation in several processes under ZeRO 0 to 2: the same losses as in one process."""

from __future__ import annotations

import pytest
from ranks import Ranks
from run_log import read_log

from lumos.compression.distillation import distill

KEYS = (
    "loss", "grad_norm", "auxiliary_loss", "auxiliary_grad_norm", "kd_loss", "icd_loss", "mca_loss", "critic_real", "critic_fake",
)  # fmt: skip


@pytest.mark.parametrize("stage", [0, 2, pytest.param(1, marks=pytest.mark.thorough)])
def test_two_processes_train_as_one_and_go_on_after_a_kill(distilling, tmp_path, ranks: Ranks, stage):
    training = {"max_steps": 5, "save_every_steps": 2, "micro_batch_size": 2, "batch_size": 6}
    made = [distilling(training={**training, "output_dir": str(tmp_path / name)}) for name in ("plain", "spread")]
    plain, spread = made
    distill(plain)
    raw = spread.to_dict()
    raw["deepspeed"]["zero_stage"] = stage
    ended = ranks.run("compress distill", raw, 2, faults={1: [["kill_after_step", 3]]})
    assert ended[1].code == -9, ended[1].err
    for process in ranks.run("compress distill", raw, 2):
        assert process.code == 0, process.err
    for key in KEYS:
        assert read_log(tmp_path / "spread", key) == pytest.approx(read_log(tmp_path / "plain", key), rel=2e-3, abs=1e-4), key


@pytest.mark.slow
def test_processes_with_unequal_numbers_of_clips_stay_in_step(distilling, tmp_path, ranks: Ranks):
    training = {"max_steps": 3, "batch_size": None, "tokens_per_batch": 80, "micro_batch_size": 1}
    raw = distilling(training=training).to_dict()
    raw["deepspeed"]["zero_stage"] = 2
    for process in ranks.run("compress distill", raw, 2):
        assert process.code == 0, process.err
    assert sorted(read_log(tmp_path / "run", "critic_fake")) == [1, 2, 3]
