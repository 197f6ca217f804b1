"""Every command of the pages and at the heads of recipes is understood, and examples in Python import what exists.

A command's options exist, and its recipe takes the overrides behind it.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from contextlib import suppress
from pathlib import Path

import pytest
from pages import ROOT, blocks, command_lines, verbs

from lumos.cli import VERBS, main
from lumos.compression.recipes import read_recipe
from lumos.errors import NotFound
from lumos.evaluation.experiments import settings as experiments
from lumos.training import settings as training
from lumos.training.tokenizer import settings as tokenizers

PAGES = [path for folder in ("docs", "checkpoints", "integrations") for path in (ROOT / folder).rglob("*.md")]
FILES = [ROOT / "README.md", *PAGES, *(ROOT / "configs").rglob("*.yaml")]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(path: Path) -> list[list[str]]:
    """Return the words of each command of Lumos in a page or at the head of a recipe, from the verb on. A launcher may start it."""
    if path.suffix == ".md":
        lines = command_lines(name(path))
    else:
        comments = "\n".join(re.findall(r"^#(.*)$", path.read_text(), re.MULTILINE)).replace("\\\n", " ")
        lines = [line for line in comments.splitlines() if line.startswith("   ")]
    found = []
    for words in (shlex.split(part, comments=True) for line in lines for part in re.split("; |&& ", line)):
        program = next((n for n, word in enumerate(words) if word in ("train.py", "generate.py", "lumos")), None)
        if program is not None and words[program - 1] not in ("install", "cd"):
            verb = words[program].removesuffix(".py")
            found.append([verb] * (verb != "lumos") + words[program + 1 :])
    return found


def check_settings(words: list[str], args) -> None:
    """Read the recipe of a command with its overrides, if the repository has the recipe."""
    config = getattr(args, "config", None)
    if config is None or not Path(config).exists():
        return
    load = {"train": training.load_settings, "train-tokenizer": tokenizers.load_settings, "compress": read_recipe}
    if words[0] == "experiment":
        experiments.load(config)
    elif words[0] in load:
        with suppress(NotFound):  # a model that an earlier command makes
            load[words[0]](config, args.overrides)


@pytest.mark.parametrize("path", [path for path in sorted(FILES) if commands(path)], ids=name)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_command_is_understood(path, monkeypatch, capsys):
    asked: list = []
    for verb in VERBS:
        monkeypatch.setattr(importlib.import_module(f"lumos.commands.{verb.replace('-', '_')}"), "run", asked.append)
    monkeypatch.chdir(ROOT)
    for words in commands(path):
        words = [word for n, word in enumerate(words) if word != "..." or words[n - 1].startswith("--")]  # `...` for more options
        assert main(words) == 0, (words, capsys.readouterr().err)
        check_settings(words, asked.pop() if asked else None)


@pytest.mark.parametrize("page", [name(path) for path in sorted(FILES) if path.suffix == ".md" and blocks(name(path), "python")])
def test_examples_import_what_exists(page):
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] not in ("lumos", "tokenizer"):
                continue
            try:
                module = importlib.import_module(node.module)
            except ModuleNotFoundError as error:
                if error.name.partition(".")[0] in ("lumos", "tokenizer"):
                    raise
                continue  # an extra is not installed
            for part in node.names:
                assert hasattr(module, part.name) or importlib.import_module(f"{node.module}.{part.name}")


@pytest.mark.slow
def test_the_first_commands_of_the_data_page(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow")
    for part in ("checkpoints", "configs"):
        (tmp_path / part).symlink_to(ROOT / part)
    monkeypatch.chdir(tmp_path)
    assert main(["render", "--out", "clips", "--count", "3"]) == 0
    Path("captions.jsonl").write_text('{"path": "00000.mp4", "caption": "a caption of its own"}\n')
    ingest, inspect, train = verbs("docs/data/index.md")[:3]
    few = ["training.max_steps=1", "training.batch_size=2", "training.device=cpu", "data.workers=0", "data.stages=[]"]
    for command in ([*ingest, "--workers", "0"], inspect, [*train, *few]):
        assert main(command) == 0, (command, capsys.readouterr().err)
    assert Path("shards/sheet.png").is_file()
    assert Path("runs/tiny-clips/export/model.safetensors").is_file()
