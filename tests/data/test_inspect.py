"""`inspect`: its output for a folder of shards, and its contact sheet."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

pytest.importorskip("pyarrow")

from lumos.cli import main


def test_inspect_prints_and_draws(ingested, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", str(ingested), "--sheet", str(sheet), "--sheet-clips", "4", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["clips"], summary["pictures"], summary["sizes"]) == (7, 1, {"24x16": 8})
    assert summary["codes"] == 7 * 12 + 6
    assert 0 < summary["codes_used"] <= 1
    assert summary["code_perplexity"] <= 64
    assert Image.open(sheet).width > 200
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds no ingested clips" in capsys.readouterr().err
    assert main(["inspect", str(ingested), "--sheet", str(tmp_path / "sheet.jpg")]) == 2
    assert "sheet.jpg must end in .png" in capsys.readouterr().err
    assert main(["inspect", str(ingested), "--no-sheet", "--sheet-clips", "3"]) == 2
    assert "--sheet-clips has no effect with --no-sheet" in capsys.readouterr().err


def test_a_sheet_beside_the_shards_by_default(ingested, tmp_path, capsys):
    out = tmp_path / "shards"
    shutil.copytree(ingested, out)
    before = {path.name for path in out.iterdir()}
    assert main(["inspect", str(out), "--no-sheet"]) == 0
    assert {path.name for path in out.iterdir()} == before
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr()
    assert f"sheet: {out / 'sheet.png'}" in shown.out.splitlines()
    assert "clips             7" in shown.out.splitlines()
    assert Image.open(out / "sheet.png").width > 200
    assert {path.name for path in out.iterdir()} == before | {"sheet.png"}


def test_without_tokenizer_or_place_only_the_sheet_is_missing(ingested, tmp_path, capsys):
    out = tmp_path / "shards"
    shutil.copytree(ingested, out)
    description = json.loads((out / "dataset.json").read_text())
    description["tokenizer"]["folder"] = str(tmp_path / "gone")
    (out / "dataset.json").write_text(json.dumps(description))
    assert main(["inspect", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["clips"] == 7
    assert "no sheet: " in shown.err
    assert "gone" in shown.err
    assert main(["inspect", str(out), "--sheet", str(tmp_path / "s.png")]) == 2
    capsys.readouterr()
    assert main(["inspect", str(out), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    (out / "sheet.png").mkdir()  # a place that cannot be written to
    assert main(["inspect", str(out)]) == 0
    assert "no sheet: " in capsys.readouterr().err
