"""Rules of plans are pure functions; a plan is a file that can be read and edited."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumos.compression.plans import (
    OF_SCORES,
    RULES,
    Plan,
    bk,
    check_keep,
    greedy,
    lowest,
    middle,
    read_plan,
    removed_by,
    spaced,
)
from lumos.errors import UserError


def test_spaced_is_the_published_list():
    assert spaced(8, 6) == [0, 1, 3, 4, 6, 7]
    assert spaced(16, 12) == [0, 1, 3, 4, 5, 7, 8, 10, 11, 12, 14, 15]


@given(count=st.integers(1, 60), data=st.data())
def test_spaced_keeps_the_ends_in_order(count, data):
    keep = data.draw(st.integers(1, count))
    kept = spaced(count, keep)
    assert len(kept) == keep == len(set(kept))
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert keep == 1 or kept[-1] == count - 1
    assert spaced(count, count) == list(range(count))
    if keep > 1:  # the rule as the specification states it, in floating point
        assert kept == [math.floor(i * (count - 1) / (keep - 1) + 0.5 + 1e-9) for i in range(keep)]


def test_bk_is_the_published_list():
    assert bk(28, 14) == [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27]
    for count, keep in ((28, 13), (7, 3), (8, 5)):
        with pytest.raises(UserError, match="the plan bk keeps one unit of each pair"):
            bk(count, keep)


def names_of(count: int) -> list[str]:
    return [str(i) for i in range(count)]


@given(count=st.integers(3, 12), data=st.data())
def test_every_rule_removes_the_number_and_keeps_the_ends(count, data):
    keep = data.draw(st.integers(2, count - 1))
    scores = {name: data.draw(st.integers(0, 5)) for name in names_of(count)}
    distances = [[abs(i - j) for j in range(count + 1)] for i in range(count + 1)]
    for rule in RULES:
        if rule == "bk" and (count % 2 or keep != count // 2):
            continue
        given_scores = {"distances": distances} if rule == "middle" else {"scores": scores} if rule in OF_SCORES else {}
        removed = removed_by(rule, names_of(count), keep, seed=3, **given_scores)
        assert len(removed) == count - keep == len(set(removed))
        assert {"0", str(count - 1)}.isdisjoint(removed) or (rule, count) == ("bk", 4)  # which has only two pairs


def test_rules_of_the_paper_and_its_opposite():
    assert removed_by("shallow", names_of(8), 5) == ["1", "2", "3"]
    assert removed_by("deep", names_of(8), 5) == ["4", "5", "6"]
    assert removed_by("scratch", names_of(8), 5) == removed_by("spaced", names_of(8), 5) == ["1", "3", "6"]
    for rule in ("spaced", "shallow", "deep", "random"):  # all parts of a kind may go, such as temporal attention
        assert removed_by(rule, names_of(8), 0, ends=True) == names_of(8), rule
    drawn = [removed_by("random", names_of(8), 5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(UserError, match="plan 'x' is unknown; allowed: spaced, least"):
        removed_by("x", names_of(8), 5)


@given(scores=st.lists(st.integers(0, 100), min_size=3, max_size=12), ends=st.booleans())
def test_greedy_of_one_removal_is_the_argmin(scores, ends):
    inner = range(len(scores)) if ends else range(1, len(scores) - 1)
    wanted = min(inner, key=lambda i: scores[i])
    units = names_of(len(scores))
    table = dict(zip(units, scores, strict=True))
    assert greedy(units, len(scores) - 1, lambda removed: table, ends) == [str(wanted)]
    assert lowest(scores, len(scores) - 1, ends) == [i for i in range(len(scores)) if i != wanted]


def test_greedy_scores_again_after_each_removal():
    """The score of unit 2 depends on whether unit 1 is present."""
    asked = []

    def score(removed):
        asked.append(list(removed))
        return {"0": 0, "1": 1, "2": 9 if "1" in removed else 2, "3": 3, "4": 0}

    assert greedy(names_of(5), 3, score) == ["1", "3"]
    assert asked == [[], ["1"]]
    assert removed_by("least", names_of(5), 3, scores=score([])) == ["1", "2"]


@given(count=st.integers(3, 9), data=st.data())
def test_middle_is_the_run_of_the_least_change(count, data):
    keep, ends = data.draw(st.integers(2, count - 1)), data.draw(st.booleans())
    table = [[data.draw(st.integers(0, 50)) for _ in range(count + 1)] for _ in range(count + 1)]
    kept = middle(table, keep, ends)
    removed = [i for i in range(count) if i not in kept]
    assert removed == list(range(removed[0], removed[0] + count - keep))
    starts = range(0 if ends else 1, keep + 1 - (0 if ends else 1))
    assert table[removed[0]][removed[-1] + 1] == min(table[i][i + count - keep] for i in starts)


@pytest.mark.parametrize(
    ("keep", "ends", "message"),
    [
        (0, False, r"--keep 0 is not allowed; there are 8 units \(0, 1, .*\): give 1 to 7"),
        (8, False, "--keep 8 is not allowed"),
        (9, True, "--keep 9 is not allowed"),
        (-1, True, "--keep -1 is not allowed"),
        (1, False, "--keep 1 does not leave the first and the last unit; give at least 2, or --allow-ends"),
    ],
)
def test_numbers_that_cannot_be_kept(keep, ends, message):
    with pytest.raises(UserError, match=message):
        check_keep(names_of(8), keep, 1, ends)


def test_numbers_that_can_be_kept():
    for keep, least, ends in ((7, 1, False), (2, 1, False), (1, 1, True), (0, 0, True)):
        check_keep(names_of(8), keep, least, ends)


# ---- files


def test_a_plan_file_is_read_and_edited(tmp_path):
    plan = Plan("spaced", "model", "layer", ("1", "3"), {"intermediate_size": 64}, False, 5, "runs/x", "ab" * 32)
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json", "ab" * 32, "model") == plan
    values = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(values | {"remove": ["2"], "plan": "mine"}))
    assert read_plan(tmp_path / "plan.json", "ab" * 32, "model").remove == ("2",)
    (tmp_path / "plan.json").write_text(json.dumps({"remove": ["2"], "sha256": "ab" * 32}))
    assert read_plan(tmp_path / "plan.json", "ab" * 32, "model") == Plan("file", "model", "", ("2",), sha256="ab" * 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "cd"}, r"is the plan of another model, 'runs/x' \(sha256 'cd', not abababababab\); make a plan of this model"),
        ({"part": "decoder"}, "is a plan for the part 'decoder', not for model; give --part decoder"),
        ({"remove": "1"}, "remove is '1'; it must be a list of different names of units"),
        ({"remove": [1]}, "it must be a list of different names of units"),
        ({"remove": ["1", "1"]}, "it must be a list of different names of units"),
        ({"sizes": [1]}, "sizes is .*; it must be an object"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be a whole number from 0 to 18446744073709551615"),
        ({"seed": -1}, "seed is -1; it must"),
        ({"seed": True}, "seed is True; it must"),
        ({"new": "yes"}, "new is 'yes'; that is not allowed"),
        ({"depth": 3}, "is no plan; it must be a JSON object with remove, sha256"),
    ],
)
def test_files_that_are_no_plan_of_this_model(tmp_path, changes, message):
    plan = Plan("spaced", "model", "layer", ("1", "3"), parent="runs/x", sha256="ab" * 32)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict() | changes))
    with pytest.raises(UserError, match=message):
        read_plan(tmp_path / "plan.json", "ab" * 32, "model")


def test_damaged_plan_files(tmp_path):
    for text in ("{", "[]", "{}", "3"):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(UserError, match=r"is not valid JSON|is no plan"):
            read_plan(tmp_path / "plan.json", "ab", "model")
