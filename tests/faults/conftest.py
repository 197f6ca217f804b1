"""Trainings in several processes, as the tests of training start them, and what `bench faults` makes for its runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lumos.commands import bench_faults as faults

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from ranks import Ranks


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pytest.importorskip("deepspeed")
    made = Ranks(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    faults.make_material(folder)
    return folder
