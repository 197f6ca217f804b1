"""The shipped tokenizer for photographs and films: what its card says, and what a user does with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lumos.cli import main
from lumos.data.shards.format import read_shards
from lumos.evaluation.reconstruction import reconstruct
from lumos.evaluation.sources import read_source
from tokenizer import VideoTokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "checkpoints" / "tokenizer-pictures"
RESULTS, OF_TINY, AT_256 = (
    json.loads((ROOT / "docs/results" / f"{name}.json").read_text())
    for name in ("tokenizer-pictures", "tokenizer", "tokenizer-pictures-256")
)


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    return VideoTokenizer.from_pretrained(FOLDER)


def test_its_codes_are_those_of_its_card(tokenizer):
    assert (tokenizer.num_codes, tokenizer.spatial_compression, tokenizer.temporal_compression) == (64_000, 8, 4)
    trained = yaml.safe_load((ROOT / "configs/tokenizer/pictures.yaml").read_text())
    settings = json.loads((FOLDER / "training.json").read_text())["settings"]
    assert {name: settings["model"][name] for name in trained["model"]} == trained["model"]
    trained.pop("model")
    assert {name: settings[name] for name in trained} == trained


def test_photographs_come_back_as_well_as_the_card_says(tokenizer):
    clips, _ = read_source("photographs", count=3, seed=0, num_frames=1, height=128, width=128)
    found = reconstruct(tokenizer, clips, 1)
    assert found.psnr == pytest.approx(RESULTS["psnr_of_each_clip"]["photographs"], abs=0.05)  # other processors round otherwise


def test_it_is_shipped_because_it_is_3_db_better():
    for source in ("photographs", "films"):
        assert RESULTS["data"][source]["psnr"] >= OF_TINY["data"][source]["psnr"] + 3


def test_the_card_has_the_measured_figures():
    card = (FOLDER / "README.md").read_text()
    for source, row in RESULTS["data"].items():
        old = OF_TINY["data"][source]
        used = f"{100 * row['codes_used']:.0f} %"
        ours, theirs = ([f"{of['psnr']:.1f} dB", f"{of['ssim']:.3f}", f"{of['bits_per_pixel']:.2f}"] for of in (row, old))
        assert f"| {' | '.join([source, str(row['clips']), *ours[:2], used, ours[2], *theirs])} |" in card
    larger = re.search(r"At 256 x 256 pixels, .* photographs have ([\d.]+) dB and films ([\d.]+) dB", card)
    assert [float(dB) for dB in larger.groups()] == [round(AT_256["data"][name]["psnr"], 1) for name in ("photographs", "films")]
    index = (ROOT / "docs/tokenizer/index.md").read_text()
    told = re.search(r"reconstructs photographs with ([\d.]+) dB and films with\s+([\d.]+) dB", index)
    assert told, "docs/tokenizer/index.md names the figures"
    assert [float(dB) for dB in told.groups()] == [round(RESULTS["data"][name]["psnr"], 1) for name in ("photographs", "films")]


def test_a_user_makes_shards_with_it(tmp_path, tokenizer):
    (tmp_path / "pictures").mkdir()
    ramp = np.linspace(40, 220, 128, dtype=np.uint8)
    picture = np.stack([np.broadcast_to(ramp, (128, 128)), np.broadcast_to(ramp[:, None], (128, 128)), np.full((128, 128), 90)], -1)
    Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a ramp of colours")
    command = ["ingest", str(tmp_path / "pictures"), "--out", str(tmp_path / "shards"), "--tokenizer", str(FOLDER)]
    assert main([*command, "--size", "128x128", "--frames", "1", "--workers", "0"]) == 0
    (row,) = read_shards(tmp_path / "shards")
    with torch.inference_mode():
        frame = tokenizer.decode(torch.as_tensor(row["codes"])[None].long())[0, :, 0].clamp(-1, 1)
    back = 127.5 * (frame.permute(1, 2, 0).numpy() + 1)
    assert 10 * np.log10(255**2 / np.mean((back - picture) ** 2)) > 28
