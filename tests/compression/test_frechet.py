"""The Fréchet distance of generated clips: its formula, and its use as a measure of units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_networks import lumos_folder, stiv_folder

from lumos.compression.frechet import frechet_scores
from lumos.errors import UserError
from lumos.pipeline.base import VideoPipeline
from lumos.pipeline.frechet import clip_features, frechet_distance


@given(seed=st.integers(0, 999), count=st.integers(2, 12), width=st.integers(1, 5))
def test_the_distance_is_that_of_its_formula(seed, count, width):
    """Compute the distance with the eigenvalues of the product of the covariances, which are real and not negative."""
    draws = np.random.default_rng(seed)
    a, b = draws.normal(size=(count, width)), 2 * draws.normal(size=(count + 1, width)) + 1
    s, t = (np.atleast_2d(np.cov(x.T)) for x in (a, b))
    root = np.sqrt(np.clip(np.linalg.eigvals(s @ t).real, 0, None)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)


def test_features_are_means_of_areas_and_their_changes():
    latents = torch.arange(2 * 3 * 4 * 4).double().view(2, 3, 4, 4)  # C, t, h, w
    found = clip_features(latents).view(2, 2, 2, 2)
    for c, i, j in np.ndindex(2, 2, 2):
        area = latents[c, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
        assert found[0, c, i, j] == pytest.approx(float(area.mean()))
        assert found[1, c, i, j] == pytest.approx(float(area.diff().abs().mean()))
    assert clip_features(latents[:, :1])[8:].eq(0).all()


@pytest.mark.slow
@pytest.mark.parametrize("folder", [lumos_folder, stiv_folder])
def test_scores_compare_the_clips_of_smaller_networks(folder, tmp_path):
    """Compares with pipelines of the smaller networks; a layer that adds nothing has the distance 0."""
    pipe = VideoPipeline.from_pretrained(folder(tmp_path / "model"), device="cpu")
    whole, prompts = pipe.model, ["a red circle moves left", "a blue square moves up", "a green circle"]
    with torch.no_grad():
        for name, parameter in whole.get_submodule(f"{whole.stack}.2").named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    clips = []
    found = frechet_scores(pipe, ["1", "2"], prompts, lambda: clips.append(1), seed=5)
    assert pipe.model is whole
    assert len(clips) == 9
    assert found["2"] == pytest.approx(0, abs=1e-6)
    assert found["1"] > 1e-3
    pipe.model = whole.without(["1"])
    alone = frechet_scores(pipe, ["2"], prompts, seed=5)
    pipe.model = whole
    jointly = frechet_scores(pipe, ["3"], prompts, removed=["1"], seed=5)["3"]  # which is "2" in the smaller network
    assert alone["2"] == pytest.approx(jointly, abs=1e-6)
    assert jointly > 1e-3
    with pytest.raises(UserError, match="needs at least 2 clips, not 1"):
        frechet_scores(pipe, ["1"], prompts[:1])
