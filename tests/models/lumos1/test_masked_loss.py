from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lumos import LumosPipeline
from lumos.cli import main
from lumos.data.synthetic.sampling import SyntheticScenes
from lumos.errors import UserError
from lumos.models.lumos1 import masked_loss
from lumos.models.lumos1.masked_loss import (
    AS_TRAINED,
    code_scores,
    masked_code_loss,
    ratio_bins,
    scene_codes,
    sequence_of,
    shard_codes,
)
from lumos.models.lumos1.masking import mask_sequence
from lumos.models.lumos1.sequence import parse_layout


@pytest.fixture(scope="module")
def pipe(micro_folder):
    return LumosPipeline.from_pretrained(micro_folder)


@pytest.fixture(scope="module")
def sequences(pipe):
    worlds = SyntheticScenes(seed=5, num_frames=9, height=16, width=24)
    return [sequence_of(pipe, *found) for found in scene_codes(worlds, 6, pipe.video_tokenizer)]


def test_scores_equal_those_of_whole_logits(pipe, sequences, monkeypatch):
    """Compares with a plain form: full logits, a loop over positions, frames counted one by one."""
    monkeypatch.setattr(masked_loss, "CHUNK", 7)
    config, model = pipe.model.config, pipe.model
    masked = mask_sequence(sequences[0], config, fixed_ratio=0.6, generator=torch.Generator().manual_seed(0))
    ids, targets = masked.input_ids[None], masked.targets[None]
    loss, right, frame = code_scores(model, ids, targets)
    with torch.no_grad():
        logits = model(ids).logits[0][:, config.visual_token_start : config.visual_token_start + config.visual_token_count].float()
        twin = model(input_ids=ids, targets=targets)
    (layout,) = parse_layout(ids, config)
    expected = []
    for k, span in enumerate(layout.frames):
        for place in range(span.start, span.end):
            wanted = int(masked.targets[place])
            if wanted != -100:
                here = logits[place]
                expected.append((F.cross_entropy(here, torch.tensor(wanted)).item(), int(here.argmax()) == wanted, k))
    assert len(expected) > 7
    torch.testing.assert_close(loss, torch.tensor([e[0] for e in expected]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, twin.position_loss, atol=1e-5, rtol=1e-5)
    assert right.tolist() == [e[1] for e in expected]
    assert frame.tolist() == [e[2] for e in expected] == twin.frame_index.tolist()


@pytest.mark.parametrize("kind", ["tube", "random", "diffusion_forcing", "tube_decay"])
def test_every_bin_hides_its_share(pipe, sequences, kind, monkeypatch):
    seen = []

    def spy(model, ids, targets):
        seen.append(ids)
        return code_scores(model, ids, targets)

    monkeypatch.setattr(masked_loss, "code_scores", spy)
    results = masked_code_loss(pipe.model, sequences, kind=kind, num_bins=4, seed=0, batch_size=4)
    assert list(results) == list(ratio_bins(4)) == ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00", AS_TRAINED]
    content = 2 * (3 + 1)  # tokens of a frame, newlines included
    shares = []
    for ids in seen[:8]:
        for row in ids:
            first = parse_layout(row[None], pipe.model.config)[0].frames[0]
            shares.append(int((row[first.content_start : first.end] == pipe.model.config.mask_token_id).sum()) / content)
    if kind != "random":  # whose share holds over the clip, not in each frame
        for k, low in enumerate((0, 0.25, 0.5, 0.75)):
            for share in shares[6 * k : 6 * k + 6]:
                assert low - 0.5 / content <= share <= low + 0.25 + 0.5 / content or share == 1 / content
    for row in results.values():
        assert row["codes"] == sum(row["by_frame"]["codes"])
        assert len(row["by_frame"]["loss"]) == 3
    if kind == "tube":
        assert all(len(set(row["by_frame"]["codes"])) == 1 for row in results.values())
    assert results["0.75-1.00"]["codes"] > results["0.25-0.50"]["codes"]


def test_the_mean_over_frames_is_weighted_by_codes(pipe, sequences):
    for row in masked_code_loss(pipe.model, sequences, kind="diffusion_forcing", num_bins=2, seed=0, batch_size=3).values():
        frames = row["by_frame"]
        for name in ("loss", "accuracy"):
            mean = np.average(frames[name], weights=frames["codes"])
            assert row[name] == pytest.approx(mean, abs=2e-5)


def test_masks_do_not_depend_on_batch_size_or_model(pipe, sequences):
    def codes(results):
        return [row["by_frame"]["codes"] for row in results.values()]

    options = {"kind": "random", "num_bins": 3}
    one, two = (masked_code_loss(pipe.model, sequences, seed=0, batch_size=size, **options) for size in (1, 5))
    assert codes(one) == codes(two)
    for a, b in zip(one.values(), two.values(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert codes(masked_code_loss(pipe.model, sequences, seed=1, batch_size=5, **options)) != codes(one)


def test_random_weights_have_a_loss_of_log_64(pipe, sequences):
    model = pipe.model
    results = masked_code_loss(model, sequences, kind="tube", num_bins=1, seed=0, batch_size=6)
    assert results["0.00-1.00"]["loss"] == pytest.approx(math.log(64), abs=0.5)  # random weights over 64 codes
    weight = model.lm_head.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        results = masked_code_loss(model, sequences, kind="tube", num_bins=1, seed=0, batch_size=6)
        assert results["0.00-1.00"]["loss"] == pytest.approx(math.log(64), abs=1e-4)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_the_worlds_from_the_command_line(micro_folder, tmp_path, capsys):
    args = ["evaluate", "loss", "--model", str(micro_folder), "--count", "3", "--bins", "2", "--num-frames", "9"]
    assert main([*args, "--output", str(tmp_path / "loss.json")]) == 0
    lines, summary = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "loss.json").read_text())
    assert lines[0].split() == ["hidden", "codes", "loss", "right", "frame", "0", "frame", "1", "frame", "2"]
    assert [line.split()[0] for line in lines[1:4]] == ["0.00-0.50", "0.50-1.00", "as"]
    assert f"{summary['results']['0.50-1.00']['loss']:.3f}" in lines[2].split()
    assert (summary["clips"], summary["num_frames"], summary["mask"]) == (3, 9, "tube")
    assert summary["data"]["worlds"]["seed"] == summary["seed"] == 1_000_000
    assert main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"] == summary["results"]
    for other in (["--split", "held_out"], ["--kinds", "digits"]):
        assert main([*args, *other, "--json"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["results"] != summary["results"]
        assert other[-1] in str(found["data"]["worlds"])


@pytest.fixture(scope="module")
def shards(micro_folder, tmp_path_factory):
    from PIL import Image

    from lumos.video.io import write_video

    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for n, frames in enumerate((13, 5, 9, 13, 1)):
        pixels = rng.integers(0, 255, (frames, 16, 24, 3), dtype=np.uint8)
        if frames == 1:
            Image.fromarray(pixels[0]).save(folder / f"{n}.png")
        else:
            write_video(folder / f"{n}.mp4", pixels, 8)
        (folder / f"{n}.txt").write_text(f"a red circle moves left on a gray background {n}")
    out = tmp_path_factory.mktemp("shards")
    assert main(["ingest", str(folder), "--out", str(out), "--tokenizer", str(micro_folder), "--fps", "8", "--size", "16x24",
                 "--frames", "13", "--min-frames", "1", "--workers", "0"]) == 0  # fmt: skip
    return out


def test_shards_give_clips_that_are_long_enough_cut_to_length(shards, pipe, capsys, micro_folder):
    found = list(shard_codes(shards, 3, 9, pipe.video_tokenizer))
    assert [tuple(codes.shape) for codes, _, _ in found] == [(3, 2, 3)] * 3
    assert {caption[-1] for _, caption, _ in found} == {"0", "2", "3"}
    assert [caption[-1] for _, caption, _ in shard_codes(shards, 1, 1, pipe.video_tokenizer)] == ["4"]
    assert [c for _, c, _ in shard_codes(shards, 2, 9, pipe.video_tokenizer)] == [c for _, c, _ in found][:2]
    with pytest.raises(UserError, match="has 3 clips of at least 9 frames, 4 are asked for"):
        list(shard_codes(shards, 4, 9, pipe.video_tokenizer))
    args = ["--data", str(shards), "--num-frames", "13", "--count", "2", "--bins", "1"]
    assert main(["evaluate", "loss", "--model", str(micro_folder), *args, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["data"] == {"shards": str(shards)}
    assert len(summary["results"][AS_TRAINED]["by_frame"]["codes"]) == 4


def test_the_clips_are_those_that_training_keeps_for_validation(shards, pipe):
    from lumos.data.curriculum import StepShape
    from lumos.data.seeding import VALIDATION_STEP
    from lumos.data.shards.source import ShardSource

    source = ShardSource(shards, pipe.video_tokenizer, kinds=["video"], num_frames=9, size_unit=8, seed=0, held_out=2)
    kept = source.clips(VALIDATION_STEP, StepShape("video", 2), range(2))
    assert [clip.caption for clip in kept] == [caption for _, caption, _ in shard_codes(shards, 2, 9, pipe.video_tokenizer)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--count", "0"], "--count 0 is not allowed"),
        (["--bins", "0"], "--bins 0 is not allowed"),
        (["--bins", "101"], "--bins 101 is not allowed"),
        (["--num-frames", "6"], "num_frames 6 is not allowed"),
        (["--data", "x", "--split", "all"], "--split have no effect with --data"),
        (["--data", "x", "--split", "all", "--kinds", "digits"], "--kinds and --split have no effect"),
        (["--kinds", "cats"], "invalid choice: 'cats'"),
        (["--data", "x"], "x holds no ingested clips"),
        (["--mask", "cube"], "invalid choice: 'cube'"),
    ],
)
def test_impossible_requests_are_refused(args, message, micro_folder, capsys):
    assert main(["evaluate", "loss", "--model", str(micro_folder), *args]) == 2
    assert message in capsys.readouterr().err
