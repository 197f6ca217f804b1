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


def test_every_test_keeps_a_variant_without_thorough(repo, forks):
    tests = repo / "tests"
    files = [path for path in tests.rglob("test_*.py") if "mark.thorough" in path.read_text() and path.name != "test_thorough.py"]
    assert files
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}

    def collected(*options) -> tuple[set[str], set[str]]:
        """Return the tests that a run has, and those that it leaves out."""
        command = ["-c", COLLECT, "--collect-only", "-p", "no:cacheprovider", *options]
        done = forks.run(command, cwd=repo, env=environment)
        assert done.returncode == 0, done.stdout[-2000:]
        run, left_out = done.stdout.split("LEFT OUT\n")
        return {line for line in run.splitlines() if "::" in line}, set(left_out.splitlines())

    short, left_out = collected(*files)
    assert left_out.isdisjoint(short)
    assert {name.partition("[")[0] for name in left_out} <= {name.partition("[")[0] for name in short}
    few = [path for path in files if path.name == "test_loss.py"]
    (some, some_left_out), whole = collected(*few), collected("--thorough", *few)
    assert some_left_out <= left_out
    assert some_left_out
    assert whole == (some | some_left_out, set())


def test_repetitions_follow_the_option(times, pytestconfig):
    assert times(2, 30) == (30 if pytestconfig.getoption("thorough") else 2)
