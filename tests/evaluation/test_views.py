"""Generated views are compared with true views, and with copies of the input view."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from lumos.data.synthetic.scene import is_held_out
from lumos.data.synthetic.solids import views
from lumos.errors import UserError
from lumos.evaluation.quality import MAX_PSNR, ssim
from lumos.evaluation.views import SOLID_KINDS, solid_set, view_quality


@pytest.fixture(scope="module")
def truth() -> list[np.ndarray]:
    return [frames for _, frames, _ in solid_set("solids", 3, 1, height=24, width=24)]


def noisy(clip: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 20, clip.shape)
    return np.clip(clip + noise, 0, 255).astype(np.uint8)


def test_quality_is_the_mean_over_solids_without_the_input_view(truth):
    generated = [noisy(clip, i) for i, clip in enumerate(truth)]
    found = view_quality(generated, truth)
    pairs = list(zip(generated, truth, strict=True))
    psnrs = [peak_signal_noise_ratio(theirs[1:], ours[1:], data_range=255) for ours, theirs in pairs]
    assert found["generated"]["psnr"] == pytest.approx(np.mean(psnrs), abs=1e-3)
    assert found["generated"]["ssim"] == pytest.approx(np.mean([ssim(ours[1:], theirs[1:]) for ours, theirs in pairs]), abs=1e-5)
    for clip in generated:
        clip[0] = 0
    assert view_quality(generated, truth) == found


def test_the_copy_is_the_true_input_view_in_every_place(truth):
    copies = [np.stack([clip[0]] * len(clip)) for clip in truth]
    found = view_quality(copies, truth)
    assert found["generated"] == found["copy"]
    assert found["copy"]["psnr"] < 25
    assert view_quality(truth, truth) == {"generated": {"psnr": MAX_PSNR, "ssim": 1.0}, "copy": found["copy"]}


def test_views_that_cannot_be_compared_are_refused(truth):
    with pytest.raises(ValueError, match="2 generated solids for 3"):
        view_quality(truth[:2], truth)
    with pytest.raises(ValueError, match="0 generated solids for 0"):
        view_quality([], [])
    with pytest.raises(ValueError, match="equal shapes"):
        view_quality([clip[:5] for clip in truth], truth)
    with pytest.raises(ValueError, match="2 views or more"):
        view_quality([clip[:1] for clip in truth], [clip[:1] for clip in truth])
    with pytest.raises(ValueError, match="uint8"):
        view_quality([clip / 255 for clip in truth], truth)


@pytest.mark.parametrize("kind", SOLID_KINDS)
def test_a_set_of_solids_follows_its_kind_and_seed(kind):
    found = solid_set(kind, 12, 8, height=16, width=16)
    assert {is_held_out(solid) for *_, solid in found} == {kind == "held_out_solids"}
    for caption, frames, solid in found[:3]:
        assert caption == ""
        assert np.array_equal(frames, views(solid, (16, 16)))
    again, other = solid_set(kind, 12, 8, height=16, width=16), solid_set(kind, 12, 9, height=16, width=16)
    assert [solid for *_, solid in again] == [solid for *_, solid in found]
    assert [solid for *_, solid in other] != [solid for *_, solid in found]


def test_sets_of_solids_that_are_not_possible():
    with pytest.raises(UserError, match="'cubes' is unknown; allowed: solids, held_out_solids"):
        solid_set("cubes", 1, 0)
    with pytest.raises(UserError, match="of memory"):
        solid_set("solids", 10**6, 0, height=4096, width=4096)
