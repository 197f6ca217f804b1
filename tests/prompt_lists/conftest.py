from __future__ import annotations

import re

import pytest

from lumos.cli import main

BAR = re.compile(r"clip/s|s/clip|\| frame ")  # a progress bar; a slow one shows seconds a clip


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def generate(micro_folder, capsys, in_empty_folder):
    """Runs `generate --model micro ...`; returns (exit code, last line of stdout, lines of stderr without progress bars)."""

    def call(*args):
        capsys.readouterr()
        code = main(["generate", "--model", str(micro_folder), *map(str, args)])
        out, err = capsys.readouterr()
        lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and not BAR.search(line)]
        return code, out.splitlines()[-1] if out else "", lines

    return call
