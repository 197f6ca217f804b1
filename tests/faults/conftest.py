"""Fixtures: the models and data that `bench faults` makes for its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lumos.commands import bench_faults as faults


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    faults.make_material(folder)
    return folder
