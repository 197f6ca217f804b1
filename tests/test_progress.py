"""Progress bars and messages: a bar on a terminal, a line each minute elsewhere, nothing with --quiet; JSON only if asked for."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest

from lumos import progress
from lumos.cli import main
from lumos.progress import LOGGER, ProgressLines, progress_bar
from lumos.runtime import bars_on_terminals


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock for progress lines that tests set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("stderr", [None, type("Console", (), {"write": lambda self, text: None, "flush": lambda self: None})()])
def test_programs_without_a_console(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    with bars_on_terminals(), progress_bar(range(3)) as bar:
        assert list(bar) == [0, 1, 2]


def test_no_terminal_gets_a_line_each_minute(clock):
    file = io.StringIO()
    with progress_bar(total=100, desc="work", file=file) as bar:
        for n in range(100):
            clock[0] = 2.0 * n  # 200 seconds in all
            bar.set_postfix(loss=n, refresh=False)
            bar.update()
            bar.refresh()
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("work: ") for line in lines)
    assert "\r" not in file.getvalue()


def test_a_short_run_prints_no_line(clock):
    file = io.StringIO()
    for _ in progress_bar(range(5), file=file):
        clock[0] += 1
    assert file.getvalue() == ""


def test_a_terminal_gets_a_bar():
    file = Terminal()
    with progress_bar(total=2, file=file) as bar:
        bar.update(2)
        assert not isinstance(bar, ProgressLines)
    assert "\r" in file.getvalue()
    assert "2/2" in file.getvalue()


def test_a_notebook_gets_a_bar(monkeypatch):
    """The streams of Jupyter say that they are no terminals, and draw a bar all the same."""
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    assert not stream.isatty()
    with progress_bar(total=2, file=stream) as bar:
        bar.update(2)
    assert "2/2" in stream.getvalue()


def test_quiet_shows_no_bar_and_no_note(known_words: Path, tmp_path: Path, capsys):
    command = ["generate", "--model", str(known_words), "--prompt", "a purple circle"]
    assert main([*command, "--output", str(tmp_path / "a.mp4"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["generate", "--model", "nowhere", "--prompt", "x", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    command[-1] = "an orange circle"  # Python shows the same warning of a process once
    assert main([*command, "--output", str(tmp_path / "b.mp4")]) == 0
    assert "orange" in capsys.readouterr().err
    assert LOGGER.level == logging.NOTSET  # the settings of a verb end with it
    assert LOGGER.handlers == []


@pytest.fixture
def known_words(micro_folder: Path, tmp_path: Path) -> Path:
    from lumos import VideoPipeline
    from lumos.data.trained_on import TrainedOn

    pipe = VideoPipeline.from_pretrained(micro_folder, device="cpu")
    pipe.trained_on = TrainedOn.of(["a red circle"])
    pipe.save_pretrained(tmp_path / "known")
    return tmp_path / "known"


def test_json_is_printed_only_if_asked_for(micro_folder: Path, capsys):
    command = ["plan", "--generate", "--model", str(micro_folder), "--device", "cpu"]
    assert main(command) == 0
    with pytest.raises(ValueError, match="Expecting value: line 1"):
        json.loads(capsys.readouterr().out)
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] > 0
    assert main(["info", str(micro_folder), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["generator"] == "lumos1"
    assert "lumos1" in said.err  # the text for people
    assert main(["info", str(micro_folder), "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    assert (json.loads(said.out)["generator"], said.err) == ("lumos1", "")
    assert sys.stdout is not sys.stderr


def test_json_of_what_a_verb_made(micro_folder: Path, tmp_path: Path, monkeypatch, capsys):
    """Stdout has one line, and it says what was written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("a red circle\na blue square\n")
    clip = ["--model", str(micro_folder), "--num-frames", "1", "--height", "16", "--width", "16", "--num-inference-steps", "1"]
    for words, names in (
        (["render", "--count", "1", "--num-frames", "1", "--out", "clips"], {"out": "clips", "kind": "one", "count": 1, "seed": 0}),
        (["generate", *clip, "--prompt", "a red circle", "--seed", "3", "--output", "one.png"], {"output": "one.png", "seed": 3}),
        (["generate", *clip, "--prompts", "list.txt", "--output-dir", "many"], {"output_dir": "many", "made": 2, "rows": 2}),
    ):
        assert main([*words, "--json"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        found = json.loads(line)
        assert {name: found[name] for name in names} == names
    assert json.loads((tmp_path / "one.png.json").read_text())["prompt"] == "a red circle"


def test_json_of_a_launcher_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("lumos.compression.recipes.read_recipe", lambda config, overrides: ({}, lambda settings: {"step": 1}))
    monkeypatch.setattr("lumos.training.settings.load_settings", lambda config, overrides: {})
    monkeypatch.setattr("lumos.training.loop.train", lambda settings: {"step": 1})
    for rank, printed in (("0", '{"step": 1}\n'), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert main(["compress", "distill", "--config", "x.yaml", "--json"]) == 0
        assert capsys.readouterr().out == printed
        assert main(["train", "--config", "x.yaml", "--json"]) == 0
        assert capsys.readouterr().out == printed


def test_messages_of_the_library_go_to_its_logger(caplog, tmp_path: Path):
    from lumos.training.logging import RunLog

    with caplog.at_level(logging.INFO, logger="lumos"):
        log = RunLog(tmp_path, first_step=0, max_steps=1, enabled=True)
        log.say("resumed from step 3")
        RunLog(tmp_path, first_step=0, max_steps=1, enabled=False).say("another process")
        log.close()
    assert [record.message for record in caplog.records] == ["resumed from step 3"]
