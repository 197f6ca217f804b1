"""Verdicts on the claims of an experiment, and the Markdown tables of its results."""

from __future__ import annotations

import math

import numpy as np
import pytest
import yaml

from lumos.cli import main
from lumos.errors import UserError
from lumos.evaluation.experiments import results, runs
from lumos.evaluation.experiments.claims import AGREES, DISAGREES, TOO_EARLY, at_chance, judged, verdict
from lumos.evaluation.experiments.intervals import (
    STUDENT,
    intervals,
    paired_difference,
    same_clips_difference,
    share_difference,
    summary,
)
from lumos.evaluation.experiments.settings import FIGURES, MORE_FIGURES, load
from lumos.evaluation.experiments.tables import claims_table, figures_table
from lumos.evaluation.experiments.words import KINDS, WORDS, in_words
from lumos.evaluation.prompts import KINDS as PROMPT_KINDS

CLAIM = {"text": "Dropout keeps motion.", "paper": "10.2, 24.0", "figure": "motion", "better": "with", "than": "without",
         "margin": 0.0, "floor": {}}  # fmt: skip


def row(figure: str, values: list[float], of: int | None = None) -> dict:
    """Return a variant with a figure in each seed, which is a share of `of` clips if that is not None."""
    runs = [{"seed": seed, "shares": {figure: value}, "counts": {figure: [round(value * of), of]} if of else {}}
            for seed, value in enumerate(values)]  # fmt: skip
    return {"runs": runs, "summary": summary(runs), "intervals": intervals(runs)}


def result(first: dict, second: dict, *, trained: bool = True, **claim) -> dict:
    found = {"train": {"config": "x.yaml" if trained else None}, "names": {}, "claims": [CLAIM | claim],
             "variants": {"with": first, "without": second}}  # fmt: skip
    return found | {"claims": judged(found)}


@pytest.mark.parametrize(("gain", "margin", "expected"), [
    ([0.1, 0.3], 0.0, AGREES), ([-0.3, -0.1], 0.0, DISAGREES), ([-0.1, 0.3], 0.0, TOO_EARLY), ([0.0, 0.0], 0.0, TOO_EARLY),
    ([0.1, 0.3], 0.2, TOO_EARLY), ([0.1, 0.15], 0.2, DISAGREES), ([-0.05, 0.1], -0.1, AGREES),
])  # fmt: skip
def test_a_verdict_follows_from_the_interval_alone(gain, margin, expected):
    assert verdict(gain, margin) == expected


def test_intervals_of_differences():
    assert paired_difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5], abs=1e-3)
    assert paired_difference([1.0, 2.0, 3.0], [0.5, 1.5, 2.5]) == [0.5, 0.5]  # seeds that go together
    low, high = share_difference([[28, 35], [28, 35]], [[24, 40], [24, 40]])  # Newcombe's example of 56 of 70 and 48 of 80
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=1e-3)


def test_the_same_clips_are_compared_one_by_one():
    """30 right in both variants, 10 in the first alone, 4 in the second alone, 28 in none, by hand."""
    one, other = "1" * 40 + "0" * 32, "1" * 30 + "0" * 10 + "1" * 4 + "0" * 28
    together = (30 * 28 - 10 * 4 - 36) / (40 * 32 * 34 * 38) ** 0.5
    p, q, low, high, least, most = 40 / 72, 34 / 72, 0.4408, 0.6647, 0.3612, 0.5862  # Wilson
    below = ((p - low) ** 2 - 2 * together * (p - low) * (most - q) + (most - q) ** 2) ** 0.5
    above = ((high - p) ** 2 - 2 * together * (high - p) * (q - least) + (q - least) ** 2) ** 0.5
    assert same_clips_difference(one, other) == pytest.approx([p - q - below, p - q + above], abs=1e-3)
    alone = share_difference([[40, 72]], [[34, 72]])
    assert alone[0] < same_clips_difference(one, other)[0] < 0 < same_clips_difference(one, other)[1] < alone[1]
    assert same_clips_difference("1111", "0000") == share_difference([[4, 4]], [[0, 4]])


@pytest.mark.parametrize("trained", [False, True])
def test_verdicts_use_the_pairs_of_clips(trained: bool):
    """22 of 24 clips of each seed agree, so that at most a tenth is lost; the shares alone do not show it."""
    sides = [{"runs": [{"shares": {"motion": 0.5}, "counts": {"motion": [12, 24]}, "verdicts": {"motion": marks}}] * 3}
             for marks in ("10" * 12, "10" * 11 + "01")]  # fmt: skip
    found = result(*sides, trained=trained, margin=-0.1)["claims"][0]
    assert (found["interval"], found["verdict"]) == (same_clips_difference("10" * 36, ("10" * 11 + "01") * 3), AGREES)
    for side in sides:
        for run in side["runs"]:
            run.pop("verdicts", None)
    assert result(*sides, trained=trained, margin=-0.1)["claims"][0]["verdict"] == TOO_EARLY


@pytest.mark.parametrize("count", range(2, 11))
def test_quantiles_are_those_of_students_distribution(count: int):
    """By integration of the density, of one degree of freedom less than there are values."""
    free = count - 1
    scale = math.gamma((free + 1) / 2) / (math.gamma(free / 2) * (free * math.pi) ** 0.5)
    ends = np.linspace(0, STUDENT[count], 20_001)
    density = scale * (1 + ends**2 / free) ** (-(free + 1) / 2)
    inside = (density[1:] + density[:-1]).sum() * (ends[1] - ends[0])  # both halves, by trapezoids
    assert inside == pytest.approx(0.95, abs=5e-5)


def test_three_seeds_that_agree_are_no_proof_with_few_clips():
    one, other = row("motion", [0.5, 0.5, 0.5], of=24), row("motion", [0.4583, 0.4583, 0.4583], of=24)
    assert result(one, other)["claims"][0]["verdict"] == TOO_EARLY
    one, other = row("motion", [0.75, 0.7917, 0.7917], of=24), row("motion", [0.2917, 0.25, 0.3333], of=24)
    assert result(one, other)["claims"][0]["verdict"] == AGREES
    assert result(other, one)["claims"][0]["verdict"] == DISAGREES


def test_several_variants_count_as_one_by_their_mean():
    rows = {"a": row("motion", [0.5, 0.75, 1.0], of=8), "b": row("motion", [0.25, 0.5, 0.25], of=8),
            "c": row("motion", [0.125, 0.25, 0.25], of=16)}  # fmt: skip
    claim = CLAIM | {"better": ["a", "b"], "than": "c"}
    (found,) = judged({"train": {"config": "x.yaml"}, "names": {}, "claims": [claim], "variants": rows})
    assert found["values"] == pytest.approx([0.5417, 0.2083])  # of both variants 0.375, 0.625, 0.625 by seed
    paired = paired_difference([0.375, 0.625, 0.625], [0.125, 0.25, 0.25])
    pooled = share_difference([[6, 16], [10, 16], [10, 16]], [[2, 16], [4, 16], [4, 16]])
    assert found["interval"] == [min(paired[0], pooled[0]), max(paired[1], pooled[1])]
    losses = {name: {"runs": [{"seed": n, "curves": {"val": [[0, 9.0], [1, value + 0.1 * n]]}} for n in range(3)]}
              for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))}  # fmt: skip
    (found,) = judged({"train": {"config": "x.yaml"}, "names": {}, "claims": [claim | {"figure": "val"}], "variants": losses})
    assert (found["values"], found["verdict"]) == (pytest.approx([1.6, 3.1]), AGREES)


def test_models_trained_by_seed_need_seeds_that_agree():
    one, other = row("motion", [0.2, 0.8, 0.8], of=40), row("motion", [0.3, 0.3, 0.3], of=40)
    assert result(one, other)["claims"][0]["verdict"] == TOO_EARLY
    assert result(one, other, trained=False)["claims"][0]["verdict"] == AGREES  # the clips of one model are independent


def test_less_is_better_of_distances_and_losses():
    near, far = row("frechet", [1.0, 1.1, 0.9]), row("frechet", [2.0, 2.2, 1.9])
    found = result(near, far, figure="frechet")["claims"][0]
    assert (found["verdict"], found["difference"]) == (AGREES, -1.0333)
    losses = ((1.0, 1.1, 0.9), (2.0, 2.2, 1.9))
    curves = [{"runs": [{"curves": {"val_loss": [[1, value]]}} for value in values]} for values in losses]
    assert result(*curves, figure="val_loss")["claims"][0]["verdict"] == AGREES


def test_figures_at_the_level_of_chance_say_nothing():
    one, other = row("motion", [0.24, 0.25, 0.26]), row("motion", [0.14, 0.15, 0.16])
    assert result(one, other)["claims"][0]["verdict"] == AGREES
    found = result(one, other, floor={"motion": 0.3})["claims"][0]
    assert (found["verdict"], found["at_chance"]) == (TOO_EARLY, ["motion"])
    pairs = {"motion": (0.5, 0.1), "colour": (0.5, 0.1)}
    assert at_chance("motion", pairs, {"motion": 0.3}) == []  # that one of the two fails is the finding
    assert at_chance("motion", pairs, {"colour": 0.3}) == ["colour"]


def test_a_claim_needs_its_figure_in_every_run():
    one, other = row("motion", [0.5, 0.5, 0.5]), row("motion", [0.5, 0.5, 0.5])
    del other["runs"][1]["shares"]["motion"]
    with pytest.raises(UserError, match="motion was measured in 2 of 3 runs"):
        result(one, other)


def test_figures_are_in_words():
    words = [in_words(name, {"moved": "amount"}) for name in ("moved", "all of two", "val_loss")]
    assert words == ["amount", "prompts followed, two shapes", "val_loss"]
    assert set(WORDS) == {*FIGURES, *MORE_FIGURES}
    assert set(KINDS) == set(PROMPT_KINDS)


def test_tables_are_markdown():
    found = result(row("motion", [0.5, 0.5, 0.5], of=24), row("motion", [0.25, 0.25, 0.25], of=24), floor={"motion": 0.1})
    head, _, line = claims_table([found, found]).splitlines()[:3]
    assert head == "| claim | paper | here: difference and its 95 % interval | verdict |"
    assert line == "| Dropout keeps motion. | 10.2, 24.0 | motion right 0.50 against 0.25: +0.25 (+0.09, +0.39) | agrees |"
    rows = figures_table(found, ["motion", "moved"]).splitlines()
    assert rows[0] == "| variant | motion right | motion, over the truth's |"
    assert rows[2] == "| with | 0.50 (0.39, 0.61) | - |"
    chance = result(row("motion", [0.1, 0.1, 0.1]), row("motion", [0.3, 0.3, 0.3]), floor={"motion": 0.4})
    assert "−0.20 (−0.20, −0.20); motion right at chance | too early to tell |" in claims_table([chance])


@pytest.mark.parametrize(("change", "message"), [
    ({"text": ""}, r"claims\[0\]\.text is empty"),
    ({"better": "c"}, r"claims\[0\]: 'c' is no variant; name two of a, b"),
    ({"better": "b"}, "compares 'b' with itself"),
    ({"better": ["a", "b"]}, "compares 'b' with itself"),
    ({"better": ["a", "a"]}, "a list of different variants"),
    ({"better": []}, "a list of different variants"),
    ({"better": [1]}, r"better\[0\] must be text"),
    ({"figure": "frechet"}, "'frechet' is none of the figures and curves, motion"),
    ({"floor": {"colour": 0.2}}, "'colour' is none of the figures"),
    ({"floor": {"motion": "low"}}, "floor has 'low'; give the value of chance"),
    ({"seeds": [0, 1]}, "no verdict follows from 2 seeds; give 3 to 10"),
    ({"winner": "a"}, "unknown key claims.*winner"),
])  # fmt: skip
def test_mistakes_in_a_claim(change, message, tmp_path):
    claim = {"text": "More is better.", "figure": "motion", "better": "a", "than": "b"} | change
    study = {"prompts": [], "figures": ["motion"], "seeds": claim.pop("seeds", [0, 1, 2]), "variants": {"a": {}, "b": {}}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study | {"claims": [claim]}))
    with pytest.raises(UserError, match=message):
        load(path)


def test_the_command_ends_with_the_table_of_claims(tmp_path, monkeypatch, capsys):
    found = result(row("motion", [0.5, 0.5, 0.5], of=24), row("motion", [0.25, 0.25, 0.25], of=24))
    monkeypatch.setattr(runs, "run", lambda *_: None)
    monkeypatch.setattr(results, "gather", lambda *_: found)
    monkeypatch.setattr(results, "write", lambda *_: None)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"prompts": [], "variants": {"with": {}, "without": {}}}))
    assert main(["experiment", str(path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert claims_table([found]) in printed
    assert "with                      motion 0.500" in printed
