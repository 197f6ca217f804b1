"""The tables of docs/findings: they are those of the JSON files of docs/results, and of the claims of configs/experiments."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from pages import ROOT

SPEC = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "site" / "tables.py")
tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tables)

STUDIES = sorted(path.stem for path in (ROOT / "configs" / "experiments").glob("*.yaml") if not path.stem.endswith("base"))


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "findings").glob("*.md")), ids=lambda page: page.stem)
def test_tables_of_a_page_are_those_of_the_results(page: Path):
    text = page.read_text()
    assert tables.filled(text, ROOT) == text, "run: python docs/site/tables.py"


@pytest.mark.parametrize("name", STUDIES)
def test_results_hold_the_claims_of_their_study(name: str):
    result = ROOT / "docs" / "results" / f"{name}.json"
    if result.is_file():
        found = json.loads(result.read_text())
        assert "variants" in found, "another command wrote a file of this name"
        assert found.get("claims", []) == tables.judge(name, ROOT)["claims"], "run: python docs/site/tables.py"


def test_tables_are_written_between_their_marks(tmp_path: Path):
    study = {"prompts": [], "figures": ["all", "moved"], "seeds": [0, 1, 2], "variants": {"a": {}, "b": {}},
             "names": {"moved": "amount"},
             "claims": [{"text": "More helps.", "figure": "all", "better": "a", "than": "b"}]}  # fmt: skip
    runs = {name: [{"seed": seed, "shares": {"all": share}, "counts": {"all": [round(24 * share), 24]}} for seed in range(3)]
            for name, share in (("a", 0.75), ("b", 0.25))}  # fmt: skip
    variants = {name: {"runs": of, "summary": {"all": [of[0]["shares"]["all"], 0.0]}} for name, of in runs.items()}
    for folder in ("configs/experiments", "docs/results", "docs/findings"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configs/experiments/x.yaml").write_text(yaml.safe_dump(study))
    result = tmp_path / "docs/results/x.json"
    result.write_text(json.dumps({"train": {"config": None}, "variants": variants}))
    page = tmp_path / "docs/findings/page.md"
    page.write_text("First.\n<!-- claims: x -->\n<!-- end -->\n<!-- figures: x | all | moved -->\nold\n<!-- end -->\nAfter.\n")
    tables.main(tmp_path)
    text = page.read_text()
    assert "| More helps. | - | prompts followed 0.75 against 0.25: +0.50 (+0.34, +0.62) | agrees |\n<!-- end -->" in text
    rows = "| variant | prompts followed | amount |\n| --- | --- | --- |\n| a | 0.75 | - |\n| b | 0.25 | - |\n"
    assert f"<!-- figures: x | all | moved -->\n{rows}<!-- end -->\nAfter.\n" in text
    assert "old" not in text
    assert json.loads(result.read_text())["claims"][0]["verdict"] == "agrees"
    tables.main(tmp_path)
    assert page.read_text() == text


def test_some_claims_of_a_study_may_be_chosen():
    every = tables.judge("positions", ROOT)["claims"]
    assert tables.chosen("positions", ROOT)["claims"] == every
    assert tables.chosen("positions:1,5", ROOT)["claims"] == [every[0], every[4]]
