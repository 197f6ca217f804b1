"""The published recipes have the figures of docs/reference, section 9, and train when they are made small."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")

from run_log import read_log

from lumos import LumosForVideoGeneration
from lumos.data.buckets import bucket_sizes
from lumos.data.curriculum import Curriculum
from lumos.data.ingest.encode import TARGET_SIZES
from lumos.data.shards import format as shards
from lumos.data.shards.description import DESCRIPTION, FORMAT
from lumos.errors import UserError
from lumos.files import write_json
from lumos.models.lumos1.sequence import num_latent_frames
from lumos.training.deepspeed_engine import deepspeed_options
from lumos.training.loop import train
from lumos.training.settings import load_settings
from tokenizer.fingerprint import tokenizer_facts
from tokenizer.video import VideoTokenizer

ROOT = Path(__file__).parents[2]
SIZES, STAGES, GPUS = ("0.5b", "1b", "3b"), ("stage1", "stage2", "384p"), 48
LR = {"0.5b-stage1": 5e-5, "1b-stage1": 5e-5, "3b-stage1": 1e-4}  # else 2.5e-5
SHRUNK = {
    "vocab_size": 11_000, "visual_token_start": 10_000, "visual_token_count": 1000, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "pixels_per_size_unit": 8,
}  # fmt: skip
SAVE_EVERY = {"0.5b-stage1": 3000, "1b-stage1": 3000}  # else 1000


def load(name: str, *overrides: str):
    return load_settings(ROOT / "configs" / "lumos1" / f"{name}.yaml", list(overrides))


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    """Recipes name their DeepSpeed file relative to the root of the repository, where they are started."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_figures_are_the_published_ones(size: str, stage: str):
    name = f"{size}-{stage}"
    settings = load(name)
    training, data, masking = settings.training, settings.data, settings.masking
    assert settings.model.preset == size
    assert training.lr == training.min_lr == LR.get(name, 2.5e-5)
    assert (training.schedule, training.betas, training.eps, training.weight_decay) == ("constant", (0.9, 0.95), 1e-8, 0.1)
    assert (training.decay_parameters, training.clip_grad, training.ema_decay, training.precision) == ("all", 4.0, 0.0, "bf16")
    assert training.activation_checkpointing
    assert (training.save_every_steps, training.keep_last) == (SAVE_EVERY.get(name, 1000), 20)
    assert (masking.kind, masking.min_ratio, masking.text_dropout) == ("tube", 0.7, 0.1)
    assert settings.model.overrides == {"max_position_embeddings": 32768 if stage == "stage1" else 65536}
    assert settings.zero_stage == 3
    assert deepspeed_options(settings, 3, torch.bfloat16)["communication_data_type"] == "fp32"

    shapes = [Curriculum(data.stages, training.batch_size)(step) for step in range(100)]
    clips = {(shape.kind, shape.batch_size / GPUS) for shape in shapes}
    assert training.micro_batch_size is None
    if stage == "stage1":
        assert clips == {("image", 1)}
        assert training.warmup_steps == 0.0025 * 60e6 / GPUS
    else:
        assert clips == {("image", 6), ("video", 1)}
        assert [shape.kind for shape in shapes[:4]] == ["video", "image"] * 2
        assert training.warmup_steps == round(0.0025 * 10e6 / GPUS)
        assert num_latent_frames(data.num_frames) == num_latent_frames(12 * 2) == 7
    assert data.size == {"384p": "384p"}.get(stage, "256p")


@pytest.mark.parametrize("size", SIZES)
def test_each_recipe_goes_on_from_the_one_before(size: str):
    first, second, third = (load(f"{size}-{stage}") for stage in STAGES)
    assert first.model.from_ is None
    assert Path(second.model.from_) == first.output_dir / "export"
    assert Path(third.model.from_) == second.output_dir / "export"
    assert second.tokenizer.video is third.tokenizer.text is None  # those of the export


def test_every_recipe_says_how_it_is_started():
    for name in (f"{size}-{stage}" for size in SIZES for stage in STAGES):
        text = (ROOT / "configs" / "lumos1" / f"{name}.yaml").read_text()
        assert f"deepspeed --hostfile configs/deepspeed/hostfile train.py --config configs/lumos1/{name}.yaml\n" in text
    page = (ROOT / "docs" / "train" / "recipes.md").read_text()
    named = set(re.findall(r"deepspeed --hostfile \S+ train\.py --config (\S+)", page))
    assert len(named) == 3
    assert all((ROOT / path).is_file() for path in named)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_reads_the_hostfile_as_6_machines_of_8():
    from deepspeed.launcher.runner import fetch_hostfile

    slots = fetch_hostfile(str(ROOT / "configs" / "deepspeed" / "hostfile"))
    assert list(slots.values()) == [8] * 6


def test_sequences_fit_the_stated_length():
    """The published max_seq_len is enough for the longest sequence of all buckets with the longest allowed prompt."""
    for target, longest in (("256p", 32768), ("384p", 65536)):
        frame = max(h // 8 * (w // 8 + 1) + 4 for h, w in bucket_sizes(TARGET_SIZES[target]))
        assert 7 * frame + 2048 + 7 < longest


def write_shards(folder: Path, tokenizer: str, size: str) -> str:
    """Random codes: eight clips of 7 latent frames and sixteen pictures."""
    random, rows = np.random.default_rng(0), []
    for n in range(24):
        t = 7 if n < 8 else 1
        codes = random.integers(0, 1000, (t, 4, 4)).astype(np.uint16)
        row = {"id": f"c/{n}", "clip": 0, "codes": codes, "num_frames": 4 * t - 3, "height": 32, "width": 32, "source": "x"}
        said = {"fps": 12 if t > 1 else 1, "caption": "a red circle", "start": 0.0}
        rows.append(row | said | {"checksum": shards.checksum(row | said)})
    folder.mkdir()
    shards.write_shard(shards.next_shard(folder), rows)
    facts = tokenizer_facts(VideoTokenizer.from_pretrained(tokenizer))
    write_json(folder / DESCRIPTION, {"format": FORMAT, "tokenizer": facts, "settings": {"fps": 12, "size": size}})
    return str(folder)


def shrunk(tmp_path: Path, stage: str, tokenizers: dict[str, str] | None) -> list[str]:
    """Return overrides that make a recipe small: a decoder of 2 layers, the batch of 2 processes, 4 steps in float32."""
    changed = [f"model.overrides={SHRUNK}", *(f"tokenizer.{kind}={path}" for kind, path in (tokenizers or {}).items())]
    if stage != "stage1":
        changed.append("data.stages=[{image_share: 0.5, image_batch_size: 12}]")
    training = {"max_steps": 4, "batch_size": 2, "warmup_steps": 1, "log_every": 1, "device": "cpu", "precision": "fp32"}
    changed += [f"training.{name}={value}" for name, value in training.items()]
    return [*changed, "deepspeed.config=null", f"training.output_dir={tmp_path / stage}"]


@pytest.mark.slow
def test_stage_1_and_2_shrunk(micro_tokenizers, tmp_path: Path):
    path = f"data.path={write_shards(tmp_path / 'shards', micro_tokenizers['video'], '256p')}"
    first = train(load("3b-stage1", *shrunk(tmp_path, "stage1", micro_tokenizers), path))
    assert Path(first["export"]) == tmp_path / "stage1" / "export"
    overrides = [*shrunk(tmp_path, "stage2", None), path, f"model.from={first['export']}"]
    second = train(load("3b-stage2", *overrides))
    assert len(read_log(tmp_path / "stage2")) == 4
    assert len(read_log(tmp_path / "stage2", "loss_image")) == 2
    moved = [LumosForVideoGeneration.from_pretrained(run["export"]).lm_head.weight for run in (first, second)]
    assert not torch.equal(*moved)

    with pytest.raises(UserError, match=r"data.size is 384p, but .* was ingested with --size 256p"):
        train(load("3b-384p", *overrides, f"training.output_dir={tmp_path / 'third'}"))
    wide = [text.replace("'num_hidden_layers': 2", "'num_hidden_layers': 3") for text in overrides]
    with pytest.raises(UserError, match=r"has num_hidden_layers 2, but model.preset 3b has 3; name a folder of that shape"):
        train(load("3b-stage2", *wide, f"training.output_dir={tmp_path / 'third'}"))
