"""The differences of a tokenizer for twice the size: of least squared error, and nothing else of it changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lumos.errors import UserError
from tokenizer import VideoTokenizer, VideoTokenizerConfig
from tokenizer.clips import TrainingClips
from tokenizer.fitting import DifferenceFit
from tokenizer.resizing import BANDS, double, halve, same_codes
from tokenizer.training import TokenizerTrainingSettings, _Run, foreground_weight, train
from tokenizer.wavelet import patchify, spatial_patchify

MODEL = {
    "channels": 8,
    "channels_mult": [1, 2],
    "num_res_blocks": 1,
    "levels": [5, 5, 4],
    "embedding_dim": 3,
    "z_channels": 8,
    "attn_resolutions": [],
    "pointwise_ends": True,
}
WIDE = MODEL | {"spatial_patch_size": 2, "spatial_compression": 16, "resolution": 2048}
CLIPS = {"height": 32, "width": 32, "num_frames": 5, "batch_size": 3, "pictures_per_batch": 2, "share_worlds": 1.0, "seed": 4}


@pytest.fixture(scope="module")
def start() -> VideoTokenizer:
    torch.manual_seed(0)
    model = VideoTokenizer(VideoTokenizerConfig.from_dict(MODEL)).eval().requires_grad_(False)
    torch.nn.init.normal_(model.decoder.conv_out.conv3d.weight, std=0.05)
    return model


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Clips and the weights of their pixels."""
    video, is_world = TrainingClips(**CLIPS, film_sources=()).batch(number).videos("cpu")[0]
    return video, foreground_weight(video, is_world, 5.0)


def settings(output_dir, folder, **changes) -> TokenizerTrainingSettings:
    values = {"output_dir": str(output_dir), "model": WIDE, "start_from": str(folder), "train_encoder": False, "fit_batches": 4}
    return TokenizerTrainingSettings.from_dict(
        CLIPS | values | {"steps": 0, "export_dtype": "float32", "validation_clips": 2} | changes
    )


def test_the_fit_is_that_of_numpy(start):
    model = double(start)
    fit = DifferenceFit(model)
    features, wanted, weights = [], [], []
    model.decoder.conv_out.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    for number in range(3):
        video, weight = batch(number)
        fit.add(video, weight)
        model.decode(model.encode(video))
        wanted.append(patchify(spatial_patchify(video, 2), 4, "haar").unflatten(1, (64, BANDS, 3))[:, :, 1:].flatten(1, 3))
        lead = weight[:, :, :1].expand(-1, -1, 3, -1, -1)  # the first frame stands for a whole patch
        weights.append(torch.nn.functional.avg_pool3d(torch.cat([lead, weight], dim=2), (4, 8, 8)))
    x, y, w = (torch.cat([part.movedim(1, -1).flatten(0, -2) for part in parts]).double() for parts in (features, wanted, weights))
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    expected, *_ = np.linalg.lstsq(np.asarray(w.sqrt() * x), np.asarray(w.sqrt() * y), rcond=None)

    fit.solve()
    found = [p.unflatten(0, (64, BANDS, 3))[:, 1:].flatten(0, 2) for p in model.decoder.conv_out.conv3d.parameters()]
    np.testing.assert_allclose(found[0].flatten(1).T, expected[:-1], atol=2e-4 * np.abs(expected).max())
    np.testing.assert_allclose(found[1], expected[-1], atol=2e-4 * np.abs(expected).max())


def test_a_fit_changes_the_differences_alone(start, tmp_path):
    start.save_pretrained(tmp_path / "start")
    assert train(settings(tmp_path / "wide", tmp_path / "start"))["step"] == 0
    found = VideoTokenizer.from_pretrained(tmp_path / "wide")
    assert found.decoder.conv_out.conv3d.weight.unflatten(0, (64, BANDS, 3))[:, 1:].abs().max() > 1e-3
    assert same_codes(start, found)
    for name, weight in halve(found).state_dict().items():
        assert torch.equal(weight, start.state_dict()[name]), name


def test_steps_after_a_fit_see_other_clips_and_go_on_after_a_stop(start, tmp_path, monkeypatch):
    start.save_pretrained(tmp_path / "start")
    more = {"steps": 4, "warmup_steps": 1, "ema_decay": 0.5}
    train(settings(tmp_path / "whole", tmp_path / "start", **more))
    seen, draw, step = [], _Run._batch, _Run._one_step
    monkeypatch.setattr(_Run, "_batch", lambda run, number: seen.append(number) or draw(run, number))

    def stop_after_two(run, *args):
        step(run, *args)
        run.stop_requested = run.step == 2

    monkeypatch.setattr(_Run, "_one_step", stop_after_two)
    assert train(settings(tmp_path / "parts", tmp_path / "start", **more)) == {"finished": False, "step": 2}
    assert train(settings(tmp_path / "parts", tmp_path / "start", **more))["finished"]
    assert seen == [4, 5, 6, 7, 0, 1, 2, 3]
    whole, parts = (VideoTokenizer.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": None, "train_encoder": True}, "fit_batches 4 is not possible: allowed is 0 without start_from"),
        ({"model": MODEL}, "allowed is 0 without start_from, model.spatial_patch_size=2 and model.pointwise_ends=true"),
        ({"model": WIDE | {"pointwise_ends": False}}, "allowed is 0 without start_from"),
        ({"fit_batches": -1}, "fit_batches -1 is not possible: allowed is 0 or more"),
        ({"fit_batches": 0}, "steps 0 is not possible: allowed is 1 or more, or 0 with fit_batches"),
    ],
)
def test_fits_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        settings(tmp_path, tmp_path, **changes)
