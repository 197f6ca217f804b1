"""Teachers of four layers, and students of two layers that were pruned from them, for both generators."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import micro_config
from micro_stiv import micro_config as micro_stiv_config
from micro_stiv import micro_pipeline as micro_stiv_pipeline

from lumos import LumosForVideoGeneration, StivForVideoGeneration
from lumos.compression.settings import build_settings
from lumos.files import write_json

KEPT = [0, 3]
STACKS = {"lumos1": "model.layers", "stiv": "blocks"}


@pytest.fixture(autouse=True)
def small_tensors(one_thread):
    """All tests of this folder."""


def pruned(state: dict[str, torch.Tensor], stack: str) -> dict[str, torch.Tensor]:
    """Return the weights of the layers in KEPT, under new layer numbers."""
    found = {}
    for name, tensor in state.items():
        if not name.startswith(f"{stack}."):
            found[name] = tensor
            continue
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if int(number) in KEPT:
            found[f"{stack}.{KEPT.index(int(number))}.{rest}"] = tensor
    return found


def make_pair(folder: Path, generator: str, micro_folder: Path) -> dict[str, str]:
    """Write a teacher and a student, and return their folders."""
    teacher, student = folder / "teacher", folder / "student"
    torch.manual_seed(1)
    if generator == "lumos1":
        shutil.copytree(micro_folder, teacher)
        big, small = (LumosForVideoGeneration(micro_config(num_hidden_layers=n)) for n in (4, 2))
        with torch.no_grad():
            for parameter in big.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        big.save_pretrained(teacher)
    else:
        pipe = micro_stiv_pipeline(num_hidden_layers=4)
        pipe.save_pretrained(teacher)
        big, small = pipe.model, StivForVideoGeneration(micro_stiv_config(num_hidden_layers=2))
    shutil.copytree(teacher, student)
    small.load_state_dict(pruned(big.state_dict(), STACKS[generator]))
    small.save_pretrained(student)
    write_json(student / "compression.json", {"plan": "spaced", "kept": KEPT})
    return {"teacher": str(teacher), "student": str(student)}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, micro_folder) -> Callable[[str], dict[str, str]]:
    """`pairs(generator)` gives the folders of a teacher and its student."""
    made: dict[str, dict[str, str]] = {}

    def pair(generator: str) -> dict[str, str]:
        if generator not in made:
            made[generator] = make_pair(tmp_path_factory.mktemp(generator), generator, micro_folder)
        return made[generator]

    return pair


@pytest.fixture
def distilling(pairs, tmp_path) -> Callable[..., Any]:
    """A function that makes settings of a short run on clips of 5 frames of 16 x 24 pixels; keywords are sections."""

    def settings(generator: str = "lumos1", run: str = "run", **sections: Any) -> Any:
        folders = pairs(generator)
        raw = {
            "generator": generator,
            "model": {"from": folders["student"]},
            "data": {"num_frames": 5, "height": 16, "width": 32, "workers": 0, "validation_clips": 3},
            "training": {"max_steps": 4, "batch_size": 4, "warmup_steps": 1, "lr": 1e-3, "log_every": 1, "save_every_minutes": 0,
                         "device": "cpu", "output_dir": str(tmp_path / run)},
            "logging": {"peak_tflops": 0.1},
            "distill": {"teacher": folders["teacher"]},
        }  # fmt: skip
        asked = sections.get("distill", {})
        if asked.get("mca", 1) and asked.get("motion") != "difference":
            raw["distill"] |= {"critic_warmup": 0, "critic_width": 16}
        for name, values in sections.items():
            raw[name] = {**raw.get(name, {}), **values} if isinstance(values, dict) else values
        return build_settings(raw)

    return settings
