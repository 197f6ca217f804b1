"""`bench compare`: times of one machine beside each other, and no table of two machines."""

from __future__ import annotations

import json

import pytest

from lumos.benchmarks.compare import machine_of, times
from lumos.cli import main


def result(*, cpu="A", torch="2.5", threads=2, seconds=2.0, target="generate", **settings):
    return {
        "target": target, "hardware": {"cpu": cpu, "cores": 2, "memory_gb": 1.0, "gpu": None, "torch": torch},
        "versions": {"torch": torch}, "settings": {"device": "cpu", "dtype": "float32", "threads": threads, target: settings},
        "measured": {
            "matrix_product_gflops": {"float32": 9.0},
            target: {"clip_seconds": seconds, "all_clip_seconds": [1.0], "shapes": [
                {"shape": "small", "lumos": {"seconds": 2 * seconds}, "bound_seconds": None},
            ]},
        },
        "ratios": {},
    }  # fmt: skip


@pytest.fixture
def compare(tmp_path, capsys):
    def run(*results, options=()):
        paths = []
        for i, made in enumerate(results):
            paths.append(tmp_path / f"{i}.json")
            paths[-1].write_text(json.dumps(made))
        code = main(["bench", *options, "compare", *map(str, paths)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_times_are_named_by_the_keys_that_lead_to_them():
    assert dict(times(result()["measured"])) == {"generate clip_seconds": 2.0, "generate shapes small lumos seconds": 4.0}


def test_results_of_one_machine_are_a_table(compare):
    code, out, err = compare(result(), result(seconds=1.0))
    assert (code, err) == (0, "")
    *lines, last = [line.split() for line in out.splitlines()]
    last = json.loads(" ".join(last))
    assert lines[0] == ["seconds", "0.json", "1.json", "first", "/", "last"]
    assert lines[1:] == [["generate", "clip_seconds", "2", "1", "2"],
                         ["generate", "shapes", "small", "lumos", "seconds", "4", "2", "2"]]  # fmt: skip
    assert last["seconds"] == {"generate clip_seconds": [2.0, 1.0], "generate shapes small lumos seconds": [4.0, 2.0]}
    assert last["machine"]["cpu"] == "A"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"cpu": "B"}, "cpu A and B"),
        ({"torch": "2.6"}, "torch 2.5 and 2.6"),
        ({"threads": 1}, "threads 2 and 1"),
        ({"cpu": "B", "threads": 1}, "cpu A and B, threads 2 and 1"),
    ],
)
def test_results_of_different_machines_are_refused(compare, other, message):
    code, out, err = compare(result(), result(), result(**other))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"cannot be compared: {message}; measure both on one machine" in err


def test_an_older_result_names_torch_among_the_versions():
    older = result()
    del older["hardware"]["torch"]
    assert machine_of(older) == machine_of(result())


def test_different_settings_are_told(compare):
    code, _, err = compare(result(shapes=["small"]), result(shapes=["mid"]))
    assert (code, err) == (0, "note: generate was measured with different settings\n")
    code, _, err = compare(result(shapes=["small"]), result(shapes=["mid"]), options=["--quiet"])
    assert (code, err) == (0, "")


def test_json_may_be_asked_for_before_the_target(compare):
    code, out, err = compare(result(), result(), options=["--json"])
    assert (code, json.loads(out)["bench"]) == (0, "compare")
    assert "seconds" in err  # the table for people


def test_what_cannot_be_compared_is_told(compare, tmp_path, capsys):
    code, _, err = compare(result(), result(target="train"))
    assert code == 2
    assert "no time in common" in err
    code, _, err = compare(result(), {"a": 1})
    assert code == 2
    assert "1.json is no result of `bench`" in err
    assert main(["bench", "compare", str(tmp_path / "0.json")]) == 2
    assert "needs two different files or more" in capsys.readouterr().err
