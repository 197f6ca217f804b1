"""Figures on the pages of compression that a person copied: they are those of the JSON files of docs/results."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pages import ROOT

DOCS = ROOT / "docs"


def result(name: str) -> dict[str, Any]:
    return json.loads((DOCS / "results" / f"{name}.json").read_text())


def rows(page: str) -> dict[str, list[float]]:
    """Return the rows of a page's tables: the first cell without its link -> the numbers of the others."""
    found = {}
    for line in (DOCS / page).read_text().splitlines():
        if line.startswith("| "):
            name, *cells = line.strip("| ").split(" | ")
            found[re.sub(r" \(\[JSON\].*", "", name)] = [float(n) for cell in cells for n in re.findall(r"-?\d+\.?\d*", cell)]
    return found


def near(values: list[float], digits: int = 2) -> Any:
    """The values after rounding, of which a half may have gone up or down."""
    return pytest.approx(values, abs=0.501 * 10**-digits)


@pytest.mark.parametrize(("row", "name"), [
    ("decoder, lumos-tiny", "depth-lumos1"), ("diffusion transformer, stiv-tiny", "depth-stiv"),
])  # fmt: skip
def test_content_and_motion_over_depth(row: str, name: str):
    found = result(name)
    shares = [unit["motion_share"] for unit in found["scores"].values()]
    trend = found["motion_trend"]
    assert rows("compression-scores.md")[row] == near([*shares[:3], shares[-1], trend["correlation"], *trend["interval"]])
    assert found["clips"] == trend["clips"] == 128


@pytest.mark.parametrize(("row", "form"), [
    ("training step of the student", "training"), ("with `kd`", "kd"), ("with `icd`", "icd"), ("with `kd` and `icd`", "kd + icd"),
    ("with `mca`", "mca"), ("with all losses", "all"), ("with all losses, teacher in bfloat16 (AMX)", "all, teacher bf16"),
])  # fmt: skip
def test_costs_of_a_step(row: str, form: str):
    steps = result("bench-compress")["ratios"]["compress"]["steps"]
    assert rows("compression-recovery.md")[row] == near([steps[f"{form}_over_training_{what}"] for what in ("time", "memory")])


@pytest.mark.parametrize(("index", "row"), enumerate(["stiv-tiny", "pruned", "recovered"]))
def test_recovery_of_the_diffusion_transformer(index: int, row: str):
    model = result("compress-stiv-report")["models"][index]
    one, digits = (model["shares"][kind] for kind in ("one", "digits"))
    shares = [one[name] for name in ("all", "shape", "motion", "last_frame", "steady")]
    table = (DOCS / "findings" / "recovery.md").read_text().split("## The decoder")[0]
    (line,) = re.findall(rf"^\| {row} \|(.*)\|$", table, re.MULTILINE)
    _, loss, *given, moved, digit = map(float, line.split("|"))
    assert [*given, digit] == near([*shares, digits["all"]])
    assert (loss, moved) == (near(model["losses"]["loss"], 3), near(one["moved"], 1))


@pytest.mark.parametrize(("index", "row"), enumerate(["whole", "recovered"]))
def test_recovery_of_the_decoder(index: int, row: str):
    model, quality = result("compress-decoder-report")["models"][index], result(f"tokenizer-decoder-{row}")["data"]
    worlds, sprites, pixels, one, digits = rows("findings/recovery.md")[row]
    assert [worlds, sprites] == near([quality[kind]["psnr"] for kind in ("worlds", "sprites")], 1)
    assert pixels == near(model["seconds"]["pixels"], 3)
    assert [one, digits] == near([model["shares"][kind]["all"] for kind in ("one", "digits")])


@pytest.mark.parametrize(("row", "name"), [
    ("lumos-tiny", "prompts"), ("lumos-mini", "compress-lumos-mini"), ("plan `least`", "compress-lumos-mini-least"),
])  # fmt: skip
def test_prompts_followed_by_recovered_decoders(row: str, name: str):
    shares, kinds = result(name)["shares"], ("one", "two", "digits", "sprites", "held_out")
    assert rows("findings/recovery.md")[row][-5:] == near([shares[kind]["all"] for kind in kinds])
