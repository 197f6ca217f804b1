"""Without --thorough, the suite leaves out repetitions, and variants of tests that other variants cover."""

from __future__ import annotations

import os

SHORT, WHOLE = (), ("--thorough",)


def test_every_test_keeps_a_variant_without_thorough(repo, forks):
    tests = repo / "tests"
    files = [path for path in tests.rglob("test_*.py") if "mark.thorough" in path.read_text() and path.name != "test_thorough.py"]
    assert files
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}

    def collected(options) -> set[str]:
        done = forks.run(["-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *options, *files], cwd=repo, env=environment)
        assert done.returncode == 0, done.stdout[-2000:]
        return {line for line in done.stdout.splitlines() if "::" in line}

    short, whole = collected(SHORT), collected(WHOLE)
    assert short < whole
    assert {name.partition("[")[0] for name in short} == {name.partition("[")[0] for name in whole}


def test_repetitions_follow_the_option(times, pytestconfig):
    assert times(2, 30) == (30 if pytestconfig.getoption("thorough") else 2)
