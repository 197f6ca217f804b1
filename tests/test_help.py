"""`--help` of every verb is quick: it imports no library that takes long."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lumos.cli import main
from lumos.version import __version__

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


@pytest.mark.slow
def test_help_of_every_verb_imports_nothing_slow(repo):
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_output_that_nobody_reads_ends_quietly(repo):
    program = subprocess.Popen(
        [sys.executable, "-m", "lumos", "--help"], cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait() in (0, 141)


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lumos {__version__}\n"


def test_a_misspelled_word_gets_the_one_that_was_meant(capsys):
    for words, answer in (
        (["trian"], "verb 'trian', did you mean train?"), (["--verison"], "mean --version?"),
        (["generate", "--promt", "x"], "mean --prompt?"),
        (["evaluate", "promts"], "mean prompts?"), (["generate", "--dtype", "float23"], "mean float32?"),
        (["evaluate", "loss", "--modle", "x"], "mean --model?; `lumos evaluate loss --help`"),
        (["plan", "--config", "x", "--training.max_steps", "5"], "mean training.max_steps=VALUE?"),
        (["train-tokenizer", "--config", "x", "--batch-size=5"], "mean batch_size=VALUE?; `lumos train-tokenizer"),
        (["train-tokenizer", "--steps", "5", "--config", "x"], "mean steps=VALUE?; `lumos train-tokenizer"),
        (["train-tokenizer", "--confg", "x", "--config", "x"], "mean --config?; `lumos train-tokenizer"),
    ):  # fmt: skip
        assert main(words) == 2
        assert answer in capsys.readouterr().err
    assert main(["generate", "--zzz", "x"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_overrides_may_stand_anywhere(repo, capsys):
    config, found = str(repo / "configs" / "lumos1" / "tiny.yaml"), []
    overrides = ["training.batch_size=8", "training.device=cpu"]
    for words in (
        ["--config", config, *overrides, "--gpus", "1", "--json"],
        ["--config", config, overrides[0], "--gpus", "1", "--json", overrides[1]],
        [overrides[0], "--config", config, overrides[1], "--json", "--gpus", "1"],
        [f"--{overrides[0]}", "--config", config, "--json", f"--{overrides[1]}"],
    ):
        assert main(["plan", *words]) == 0
        planned = json.loads(capsys.readouterr().out)
        found.append([planned["parameters"], planned["total"]["flops"], planned["total"]["tokens"]])
    assert found[0] == found[1] == found[2] == found[3]


def test_overrides_of_parts_and_before_clips(capsys):
    for words, answer in (
        (["compress", "distill", "distill.icd=0.3", "--config", "nowhere", "distill.icd=0.2"], "no config file nowhere"),
        (["compress", "auto", "training.lr=1", "--model", "nowhere", "training.betas=1", "--target-speedup", "2"], "nowhere"),
        (["finetune", "training.lr=1e-4", "nowhere", "--out", "x", "training.betas=1"], "no source nowhere;"),
    ):
        assert main(words) == 2
        assert answer in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("closing", "code"), [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), (">/dev/full", 1)])
def test_streams_that_are_closed_or_full(repo, closing, code):
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m lumos --version {closing}"], cwd=repo, capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stdout == ("" if ">&-" in closing[:3] or code else f"lumos {__version__}\n")
    assert done.stderr == ("error: the output cannot be written (No space left on device); make room, or write it elsewhere\n"
                           if code else "")  # fmt: skip


@pytest.mark.slow
def test_characters_that_the_encoding_of_the_output_lacks(repo):
    done = subprocess.run(
        [sys.executable, "-c", "import lumos.cli as c, sys; c.open_streams(); print('红'); sys.exit(c.program(['plot', '红']))"],
        cwd=repo, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, b"\\u7ea2\n")
    assert b"there is no log \\u7ea2" in done.stderr
