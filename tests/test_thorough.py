"""Without --thorough, the suite leaves out repetitions, and variants of tests that other variants cover."""

from __future__ import annotations

import os

COLLECT = """
import sys, pytest
left_out = []
class Kept:
    def pytest_deselected(self, items):
        left_out.extend(item.nodeid for item in items)
code = pytest.main(sys.argv[1:], plugins=[Kept()])
print("LEFT OUT", *left_out, sep="\\n")
sys.exit(code)
"""


def test_every_test_keeps_a_variant_without_thorough(collected):
    """Every test of the files of this run, so of all files in a run of the whole suite."""
    run, left_out = collected
    assert left_out.isdisjoint(run)
    assert {name.partition("[")[0] for name in left_out} <= {name.partition("[")[0] for name in run}


def test_the_option_adds_the_variants_that_are_left_out(repo, forks):
    file = repo / "tests" / "models" / "lumos1" / "test_loss.py"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}

    def tests_of(*options) -> tuple[set[str], set[str]]:
        """Return the tests that a run has, and those that it leaves out."""
        command = ["-c", COLLECT, "--collect-only", "-p", "no:cacheprovider", *options, file]
        done = forks.run(command, cwd=repo, env=environment)
        assert done.returncode == 0, done.stdout[-2000:]
        run, left_out = done.stdout.split("LEFT OUT\n")
        return {line for line in run.splitlines() if "::" in line}, set(left_out.splitlines())

    some, left_out = tests_of()
    assert left_out
    assert tests_of("--thorough") == (some | left_out, set())


def test_repetitions_follow_the_option(times, pytestconfig):
    assert times(2, 30) == (30 if pytestconfig.getoption("thorough") else 2)
