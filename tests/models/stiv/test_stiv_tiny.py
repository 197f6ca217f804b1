"""The shipped model: its size, its loading, and all uses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lumos import VideoPipeline
from lumos.data.synthetic.sampling import SyntheticScenes


@pytest.fixture(scope="module")
def shipped(repo) -> Path:
    return repo / "checkpoints" / "stiv-tiny"


@pytest.fixture(scope="module")
def pipe(shipped):
    return VideoPipeline.from_pretrained(shipped, device="cpu")


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, str]:
    return SyntheticScenes(seed=3_000_000, height=128, width=128, num_frames=17, fps=8, kinds=("shapes",), share_two=0.0)[1]


def test_it_is_small_and_names_its_video_tokenizer(shipped, repo):
    assert sum(file.stat().st_size for file in shipped.rglob("*") if file.is_file()) < 30e6
    reference = json.loads((shipped / "video_tokenizer.json").read_text())
    assert (shipped / reference["folder"]).resolve() == (repo / "checkpoints" / "lumos-tiny" / "video_tokenizer").resolve()


def test_the_card_has_the_facts_of_the_folder(shipped, pipe):
    card = (shipped / "README.md").read_text()
    parameters = sum(p.numel() for p in pipe.model.parameters())
    assert f"{parameters / 1e6:.2f} M parameters" in card
    training = json.loads((shipped / "training.json").read_text())
    assert training["settings"]["generator"] == "stiv"


@pytest.mark.slow
def test_each_use_makes_a_clip(pipe, scene):
    frames, caption = scene
    few = {"num_inference_steps": 1, "output_type": "uint8", "seed": 0}
    uses = {
        "text": {}, "first": {"image": frames[0]}, "ends": {"image": frames[0], "last_image": frames[-1]},
        "prediction": {"video": frames[:4], "num_given_frames": 4},
        "interpolation": {"video": frames[::2], "interpolate": 2},
    }  # fmt: skip
    given = {"text": [], "first": [0], "ends": [0, 16], "prediction": range(4), "interpolation": range(0, 17, 2)}
    for name, use in uses.items():
        clip = pipe(caption, **use, **few).frames[0]
        assert clip.shape == (17, 128, 128, 3), name
        seen = pipe.reconstruct(frames[list(given[name])]) if len(given[name]) else ()
        for number, picture in zip(given[name], seen, strict=True):
            assert np.array_equal(clip[number], picture), (name, number)
    assert pipe(caption, num_frames=1, **few).frames[0].shape == (1, 128, 128, 3)


@pytest.mark.slow
def test_a_picture_has_the_colours_of_its_prompt(pipe):
    picture = pipe("a large red circle on a gray background", num_frames=1, seed=0, output_type="uint8").frames[0][0].astype(int)
    red = (picture[..., 0] > 150) & (picture[..., 1:].max(-1) < 110)
    grey = np.ptp(picture, axis=-1) < 40
    assert 0.02 < red.mean() < 0.6
    assert grey.mean() > 0.3
