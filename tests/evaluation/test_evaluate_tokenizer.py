"""`evaluate tokenizer`: its measurements, its data, and the command as a user types it."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lumos.cli import main
from lumos.data.synthetic import sprites
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.errors import UserError
from lumos.evaluation.quality import MAX_PSNR, ssim
from lumos.evaluation.reconstruction import reconstruct
from lumos.evaluation.sources import check_source, read_source
from lumos.training.tokenizer.clips import held_out_photographs
from lumos.video.frames import from_uint8, psnr, to_uint8
from lumos.video.io import write_video
from tokenizer import VideoTokenizer

SHAPE = {"num_frames": 5, "height": 16, "width": 24}
FLAGS = ["--num-frames", "5", "--height", "16", "--width", "24"]


@pytest.fixture(scope="module")
def tokenizer(micro_folder) -> VideoTokenizer:
    """A tokenizer of random weights, some of them large, so that different clips have different codes and reconstructions."""
    model = VideoTokenizer.from_pretrained(micro_folder)
    model.quant_conv.conv3d.weight.mul_(100)
    model.decoder.conv_out[0].conv3d.weight.mul_(10)
    return model


def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 16, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@torch.inference_mode()
def test_figures_are_those_of_each_clip_alone(tokenizer, batch_size):
    clips = [noise(5), noise(1, 1), noise(5, 2), noise(5, 3)]
    found = reconstruct(tokenizer, clips, batch_size)
    codes = [tokenizer.encode(from_uint8(clip)[None]) for clip in clips]
    back = [to_uint8(tokenizer.decode(code))[0] for code in codes]
    assert np.abs(back[0].astype(int) - back[2]).max() > 20
    for ours, theirs in zip(found.frames, back, strict=True):
        assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.array_equal(found.counts, np.bincount(torch.cat([c.flatten() for c in codes]), minlength=64))
    assert found.psnr == pytest.approx([psnr(a, b) for a, b in zip(clips, back, strict=True)], abs=1e-3)
    figures = found.figures
    assert figures["psnr"] == pytest.approx(np.mean(found.psnr), abs=1e-3)
    assert figures["ssim"] == pytest.approx(np.mean([ssim(a, b) for a, b in zip(clips, back, strict=True)]), abs=1e-4)
    assert (figures["clips"], figures["frames"], figures["codes"]) == (4, 16, (2 + 1 + 2 + 2) * 6)
    assert figures["bits_per_pixel"] == pytest.approx(7 * 6 * math.log2(64) / (16 * 16 * 24), abs=1e-5)
    assert figures["lpips"] is None
    assert figures["encode_pixels_per_second"] == pytest.approx(figures["encode_clips_per_second"] * 4 * 16 * 24, rel=0.01)


class Perfect(nn.Linear):
    """A tokenizer without loss: it keeps the video beside its only code."""

    num_codes = 1

    def encode(self, video):
        self.video = video
        return torch.zeros(len(video), 1, 1, 1, dtype=torch.long)

    def decode(self, _):
        return self.video


def test_a_perfect_tokenizer_counts_as_a_hundred_decibels():
    found = reconstruct(Perfect(1, 1), [noise(2)], 1)
    assert found.figures["psnr"] == MAX_PSNR
    assert found.figures["ssim"] == 1


def test_scenes_are_held_out_and_follow_the_seed():
    clips, left_out = read_source("worlds", count=3, seed=5, **SHAPE)
    assert [clip.shape for clip in clips] == [(5, 16, 24, 3)] * 3
    assert not left_out
    again, other = (read_source("worlds", count=3, seed=seed, **SHAPE)[0] for seed in (5, 6))
    assert np.array_equal(clips, again)
    assert not np.array_equal(clips, other)
    assert np.array_equal(clips, [SyntheticScenes(seed=5, split="held_out", **SHAPE)[index][0] for index in range(3)])


def test_sprite_clips_use_all_pictures(tmp_path, monkeypatch):
    for index, name in enumerate(sprites.SPRITES):
        Image.new("RGBA", (64, 64), (255, index, 0, 255)).save(tmp_path / f"{name}.png")
    monkeypatch.setenv("LUMOS_SPRITES", str(tmp_path))
    clips, _ = read_source("sprites", count=30, seed=5, num_frames=1, height=64, width=64)
    reddest = [clip.reshape(-1, 3)[(clip[..., 0].astype(int) - clip[..., 2]).argmax()] for clip in clips]
    assert len({int(green) for _, green, _ in reddest}) > 10
    assert len(clips) == 30


def test_photographs_are_those_kept_from_training():
    clips, _ = read_source("photographs", count=9, seed=0, **SHAPE)
    assert np.array_equal(np.stack(clips), to_uint8(held_out_photographs(16, 24)))
    assert len(read_source("photographs", count=2, seed=0, **SHAPE)[0]) == 2


def test_films_give_clips_that_do_not_overlap():
    clips, _ = read_source("films", count=6, seed=0, num_frames=9, height=16, width=16)
    assert [len(clip) for clip in clips] == [9] * 6
    assert all((a[-1] != b[0]).any() for a, b in pairwise(clips))


@pytest.fixture
def own(tmp_path):
    """A folder of clips of 12 and 3 frames, a picture, and a file of another kind."""
    folder = tmp_path / "own"
    (folder / "deeper").mkdir(parents=True)
    write_video(folder / "long.mp4", noise(12), 8)
    write_video(folder / "deeper" / "short.mp4", noise(3), 8)
    Image.fromarray(noise(1)[0]).save(folder / "picture.png")
    (folder / "broken.mp4").write_bytes(b"no film")
    (folder / "notes.txt").write_text("nothing to see")
    return folder


def test_own_files_are_known_by_their_content(tmp_path):
    """A film called .png, an animation, a picture without a suffix; a hidden film is no data, and a broken link is said."""
    write_video(tmp_path / "a.mp4", noise(6), 8)
    (tmp_path / "a.mp4").rename(tmp_path / "a.png")
    first, *rest = map(Image.fromarray, noise(5))
    first.save(tmp_path / "b.webp", save_all=True, append_images=rest, duration=100)
    first.save(tmp_path / "c", "PNG")
    (tmp_path / "._d.mp4").write_bytes(b"of macOS")
    (tmp_path / "e.mp4").symlink_to(tmp_path / "nowhere")
    clips, left_out = read_source(str(tmp_path), count=20, seed=0, **SHAPE)
    assert [len(clip) for clip in clips] == [5, 5, 1]
    assert len(left_out) == 1
    assert "e.mp4" in left_out[0]


def test_own_files_give_clips_and_reasons_for_those_left_out(own):
    clips, left_out = read_source(str(own), count=20, seed=0, **SHAPE)
    assert [len(clip) for clip in clips] == [5, 5, 1]
    assert len(left_out) == 2
    assert "broken.mp4" in left_out[0]
    assert "short.mp4 has 3 frames, 5 are needed" in left_out[1]
    assert len(read_source(str(own / "long.mp4"), count=1, seed=0, **SHAPE)[0]) == 1
    with pytest.raises(UserError, match=r"gives no clip of 5 frames: .*short.mp4 has 3 frames"):
        read_source(str(own / "deeper"), count=1, seed=0, **SHAPE)
    (own / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        read_source(str(own / "empty"), count=1, seed=0, **SHAPE)


def test_more_files_than_wanted_are_drawn_by_the_seed(tmp_path):
    for index in range(8):
        Image.fromarray(noise(1, index)[0]).save(tmp_path / f"{index}.png")
    draws = [np.stack(read_source(str(tmp_path), count=3, seed=seed, **SHAPE)[0]) for seed in (0, 0, 1)]
    assert len(draws[0]) == 3
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    for index in range(7):
        (tmp_path / f"{index}.png").write_bytes(b"damaged")
    for seed in range(3):
        clips, left_out = read_source(str(tmp_path), count=1, seed=seed, **SHAPE)
        assert len(clips) == 1, left_out


def test_sources_that_are_not_there(own):
    for source in ("films", str(own), str(own / "picture.png")):
        check_source(source)
    with pytest.raises(UserError, match="there is no data 'nothing'; allowed: worlds, sprites, photographs, films, a folder"):
        check_source("nothing")


def evaluate(*args) -> int:
    return main(["evaluate", "tokenizer", *map(str, args)])


def test_the_command(micro_folder, own, tmp_path, capsys):
    sheet, output = tmp_path / "sheet.png", tmp_path / "out.json"
    sources = ["worlds", "photographs", own]
    args = ["--tokenizer", micro_folder, "--data", *sources, "--count", 4, *FLAGS, "--sheet", sheet, "--output", output]
    assert evaluate(*args, "--sheet-clips", 2, "--json") == 0
    out, err = capsys.readouterr()
    lines, summary = err.splitlines(), json.loads(out)
    assert list(summary["data"]) == ["worlds", "photographs", str(own)]
    assert [row["clips"] for row in summary["data"].values()] == [4, 3, 3]
    assert summary["union"]["codes"] == sum(row["codes"] for row in summary["data"].values()) == 6 * (2 * 6 + 4)
    assert summary["union"]["codes_used"] >= max(row["codes_used"] for row in summary["data"].values())
    assert summary["lpips"] == "not measured: LPIPS needs frames of at least 31 x 31 pixels, got 16 x 24"
    assert any(line.startswith("LPIPS not measured: ") for line in lines)
    assert any(line.startswith("union ") for line in lines)
    assert f"left out of {own}: " in err
    stored = json.loads(output.read_text())
    assert {key: stored[key] for key in summary} == summary
    assert [len(values) for values in stored["psnr_of_each_clip"].values()] == [4, 3, 3]
    first = Image.fromarray(read_source("worlds", count=1, seed=1_000_000, **SHAPE)[0][0][0]).resize((80, 53))
    with Image.open(sheet) as image:
        above, below = (np.asarray(image.crop((4, top, 84, top + 53)), dtype=int) for top in (20, 74))
    assert np.abs(above - np.asarray(first)).mean() < 5
    assert np.abs(below - np.asarray(first)).mean() > 20


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--data", "nothing"], "there is no data"),
        (["--data", "worlds", "worlds"], "names a source twice"),
        (["--count", "0"], "--count 0 is not allowed"),
        (["--seed", "-1"], "--seed -1 is not allowed"),
        (["--batch-size", "0"], "--batch-size 0 is not allowed"),
        (["--sheet-clips", "2"], "no effect without --sheet"),
        (["--num-frames", "6"], "num_frames must be 1 + 4 * k, got 6; use 5 or 9"),
        (["--height", "20"], "multiples of 8"),
        (["--height", "-64"], "--height -64 is not allowed; give at least 1"),
        (["--sheet", "s.gif"], "s.gif must end in .png"),
        (["--sheet", "s.png", "--output", "s.png"], "s.png and s.png are one file"),
        (["--height", "8"], "8 x 24 pixels cannot be measured; SSIM needs 11 x 11"),
        (["--lpips", "nowhere"], "LPIPS needs frames of at least 31 x 31 pixels, got 16 x 24"),
        (["--lpips", "nowhere", "--height", "32", "--width", "32"], "nowhere has no alexnet"),
        (["--tokenizer", "nowhere"], "no folder nowhere"),
        (["--output", "."], "is a folder"),
    ],
)
def test_impossible_requests_are_refused(micro_folder, capsys, wrong, message):
    assert evaluate("--tokenizer", micro_folder, "--data", "worlds", *FLAGS, *wrong) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert message in err[0]
