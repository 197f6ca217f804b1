"""`--help` of every verb is quick: it imports no library that takes long."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import contextlib, io, sys
from lumos.cli import VERBS, main
from lumos.commands.compress import steps
from lumos.commands.evaluate import measurements
from lumos.benchmarks import targets
sys.path.insert(0, 'tests')
import toy_options  # what `--help` loads of a generator

verbs = [[verb] for verb in VERBS] + [["evaluate", name] for name in measurements()] + [["bench", name] for name in targets()]
verbs += [["compress", name] for name in steps()]
for verb in verbs:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([*verb, "--help"]) == 0, verb
    assert said.getvalue().startswith(f"usage: lumos {verb[0]}"), verb
    slow = {"torch", "transformers", "scipy", "PIL", "av", "gradio"} & set(sys.modules)
    assert not slow, (verb, slow)
"""


def test_help_of_every_verb_imports_nothing_slow(repo):
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_output_that_nobody_reads_ends_quietly(repo):
    program = subprocess.Popen(
        [sys.executable, "-m", "lumos", "--help"], cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait() in (0, 141)
