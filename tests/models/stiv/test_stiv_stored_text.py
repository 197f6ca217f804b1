"""States of a frozen text encoder that are stored beside the shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lumos.data.curriculum import StepShape
from lumos.data.shards import format as shards
from lumos.data.shards.description import DESCRIPTION, FORMAT
from lumos.errors import NotFinite, RunError, UserError
from lumos.files import write_json
from lumos.models.stiv.stored_text import StoredTextStates
from lumos.models.stiv.text_encoder import FrozenTextEncoder
from lumos.models.stiv.training import StivTask
from lumos.training.settings import build_settings
from tokenizer.fingerprint import tokenizer_facts
from tokenizer.video import VideoTokenizer

CAPTIONS = ["a red circle", "a circle", "a red red circle"]
VIDEO = StepShape("video", 4)


@pytest.fixture
def folder(micro_folder, tmp_path) -> Path:
    """Two shards of four clips of 5 frames of 16 x 32 pixels."""
    tokenizer, random = VideoTokenizer.from_pretrained(micro_folder), np.random.default_rng(0)
    folder = tmp_path / "shards"
    folder.mkdir()
    rows = []
    for n in range(8):
        codes = random.integers(0, tokenizer.num_codes, (2, 2, 4)).astype(np.uint16)
        row = {"id": f"c/{n}", "clip": 0, "codes": codes, "num_frames": 5, "height": 16, "width": 32, "fps": 8,
               "caption": CAPTIONS[n % 3], "source": f"{n}.mp4", "start": 0.0}  # fmt: skip
        rows.append(row | {"checksum": shards.checksum(row)})
    for start in (0, 4):
        shards.write_shard(shards.next_shard(folder), rows[start : start + 4])
    write_json(folder / DESCRIPTION, {"format": FORMAT, "tokenizer": tokenizer_facts(tokenizer), "settings": {"fps": 8}})
    return folder


@pytest.fixture
def task(micro_folder, clip_text, folder, tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 3, "text_width": 64, "latent_channels": 3}

    def make(**more) -> StivTask:
        return StivTask(build_settings({
            "generator": "stiv", "model": {"preset": "stiv-nano", "overrides": sizes}, "text_encoder": "folder",
            "tokenizer": {"video": str(micro_folder), "text": str(clip_text)}, "dropout": {"text": 0.5},
            "latents": {"kind": "causal", "mean": [0.0] * 3, "std": [1.0] * 3},
            "data": {"source": "shards", "path": str(folder), "num_frames": 5, "workers": 0},
            "training": {"max_steps": 2, "batch_size": 4, "device": "cpu", "eval_every": 0, "output_dir": str(tmp_path / "run")},
        } | more), torch.device("cpu"))  # fmt: skip

    return make


def test_stored_states_are_those_of_the_encoder_which_runs_once(task, folder, monkeypatch):
    live, stored = task().batch(0, VIDEO, range(4)), task(store_text_states=True)
    (place,) = folder.glob("text_states-*")
    assert [file.name for file in sorted(place.iterdir())] == ["shard-000000.safetensors", "shard-000001.safetensors"]
    monkeypatch.setattr(FrozenTextEncoder, "encode", lambda *_: pytest.fail("the encoder ran again"))
    again = task(store_text_states=True)
    for made in (stored, again):
        batch = made.batch(0, VIDEO, range(4)).tensors
        kept = live.tensors["text_mask"]
        assert torch.equal(batch["text_mask"], kept)
        assert not kept.all()  # captions of different lengths, and some without text
        torch.testing.assert_close(batch["text_states"][kept], live.tensors["text_states"][kept], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(batch["pooled"], live.tensors["pooled"], atol=2e-3, rtol=2e-3)


def test_texts_that_are_not_stored_are_encoded(task, clip_text, folder):
    encoder = FrozenTextEncoder.from_pretrained(clip_text)
    stored = StoredTextStates(folder, encoder, lambda caption: encoder.text_ids([caption]).ids[0].tolist())
    ids = encoder.text_ids(["circle red", CAPTIONS[0], "circle circle circle"])
    found, live = stored.encode(*ids), encoder.encode(*ids)
    torch.testing.assert_close(found.states[ids.mask], live.states[ids.mask], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(found.pooled, live.pooled, atol=2e-3, rtol=2e-3)


def test_what_cannot_be_stored_is_said(task, folder, clip_text):
    task(store_text_states=True)
    (place,) = folder.glob("text_states-*")
    (place / "shard-000001.safetensors").write_bytes(b"torn")
    with pytest.raises(RunError, match=r"shard-000001\.safetensors is damaged .* delete it"):
        task(store_text_states=True)
    with pytest.raises(UserError, match="store_text_states needs text_encoder folder"):
        task(store_text_states=True, data={"num_frames": 5, "height": 16, "width": 32, "workers": 0})
    encoder = FrozenTextEncoder.from_pretrained(clip_text)
    with torch.no_grad():
        next(encoder.model.parameters()).fill_(torch.nan)
    with pytest.raises(NotFinite, match="not finite in float16"):
        StoredTextStates(folder, encoder, lambda caption: encoder.text_ids([caption]).ids[0].tolist())
    assert list(folder.glob("text_states-*")) == [place]
