"""`lumos plot` as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from lumos.cli import main
from lumos.commands import plot
from lumos.training.loop import train


@pytest.fixture
def logs(tmp_path: Path) -> list[str]:
    """Two logs: one with places and validation, one with an event and an incomplete last line."""
    for name, shift in (("a", 0.0), ("b", 1.0)):
        (tmp_path / name).mkdir()
        lines = [{"event": "start", "step": 0}]
        for step in (1, 2, 3):
            lines.append({"step": step, "loss_video": step + shift, "frame_loss_video": [step, None], "mfu": None, "time": 1.0})
        lines += [{"step": 3, "val_loss_video": 7.0, "val_loss_video_ema": 8.0}, {"event": "end", "step": 3, "loss": 1.0}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "log.jsonl").write_text(text + ('{"step": 4, "loss_vi' if name == "b" else ""))
    return [str(tmp_path / "a"), str(tmp_path / "b" / "log.jsonl")]


def test_each_run_and_loss_has_its_own_line_and_style(logs: list[str]):
    runs = {name: plot.read_curves(name) for name in logs}
    lines = list(plot.lines_of(runs, "loss_video"))
    assert [(number, style) for number, _, style, _, _ in lines] == [(0, "-"), (0, "--"), (0, ":"), (1, "-"), (1, "--"), (1, ":")]
    assert lines[0][4] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert lines[3][4] == [(1, 2.0), (2, 3.0), (3, 4.0)]
    assert lines[4][4] == [(3, 7.0)]
    assert lines[4][1] == f"{logs[1]} val_loss_video"
    ((number, label, _, _, points), *_) = plot.lines_of(runs, "frame_loss_video")
    assert (number, label, points) == (0, f"{logs[0]} frame_loss_video 0", [(1, 1), (2, 2), (3, 3)])
    assert len(list(plot.lines_of(runs, "frame_loss_video"))) == 2
    assert list(plot.lines_of(runs, "mfu")) == []


def test_a_run_that_went_on_with_clips_of_another_length(tmp_path: Path):
    pytest.importorskip("matplotlib")
    losses = [[3.0, 2.0], [1.0], 4.0, [1.0, None, 5.0]]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": loss}) + "\n" for n, loss in enumerate(losses)))
    runs = {"a": plot.read_curves(str(tmp_path))}
    lines = [points for *_, points in plot.lines_of(runs, "loss")]
    assert lines == [[(0, 3.0), (1, 1.0), (2, 4.0), (3, 1.0)], [(0, 2.0)], [(3, 5.0)]]
    plot.draw(runs, ["loss"], str(tmp_path / "c.png"))


def axes_of(monkeypatch, runs: dict, panels: list[str], out: Path) -> list:
    """Return the axes of the picture that `draw` writes."""
    from matplotlib.figure import Figure

    seen = []
    usual = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **named: (seen.append(self), usual(self, *args, **named))[1])
    plot.draw(runs, panels, str(out))
    return seen[0].axes


def test_a_curve_of_one_point_is_a_marker_whatever_its_style(monkeypatch, tmp_path: Path):
    pytest.importorskip("matplotlib")
    runs = {"a": {"loss": [(1, 3.0)], "val_loss": [(1, 2.0)], "val_loss_ema": [(1, 1.0)]}}
    (axes,) = axes_of(monkeypatch, runs, ["loss"], tmp_path / "c.png")
    assert [(line.get_marker(), line.get_linestyle()) for line in axes.lines] == [("o", "None")] * 3
    runs = {"a": {"loss": [(1, 3.0), (2, 4.0)]}}
    (axes,) = axes_of(monkeypatch, runs, ["loss"], tmp_path / "d.png")
    assert [(line.get_marker(), line.get_linestyle()) for line in axes.lines] == [("None", "-")]


def test_a_panel_has_a_unit_the_best_value_and_readable_text(monkeypatch, tmp_path: Path):
    pytest.importorskip("matplotlib")
    runs = {"a": {"tokens_per_second": [(1, 3.0), (20, 9.0), (30, 5.0)]}}
    (axes,) = axes_of(monkeypatch, runs, ["tokens_per_second"], tmp_path / "c.png")
    assert axes.get_title() == "tokens_per_second\nbest: 9 at step 20"
    assert axes.get_ylabel() == "tokens a second"
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_legend().get_texts(), *axes.get_xticklabels()]
    assert min(text.get_fontsize() for text in texts) >= 9


def test_the_best_value_is_of_averaged_validation():
    curves = {"loss": [(1, 0.5)], "val_loss": [(1, 3.0), (2, 1.0)], "val_loss_ema": [(1, 2.0), (2, 4.0)]}
    assert plot.best_of(curves, "loss") == ("val_loss_ema", 2.0, 1)
    assert plot.best_of({"frame_loss": [(1, [1.0, None])]}, "frame_loss") is None


@pytest.mark.parametrize("width", [1, 3, 10])
def test_smoothing_is_the_mean_of_the_last_values(width):
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    slow = [sum(values[max(0, n + 1 - width) : n + 1]) / len(values[max(0, n + 1 - width) : n + 1]) for n in range(6)]
    assert [value for _, value in plot.smoothed(list(enumerate(values)), width)] == pytest.approx(slow)


def test_four_panels_are_drawn_unless_all_are_asked_for():
    known = ["mfu", "loss", "flops", "grad_norm", "tokens", "tokens_per_second", "loss_video"]
    assert plot.most_important(known) == ["loss", "loss_video", "grad_norm", "tokens_per_second"]
    assert plot.most_important(["mfu", "loss"]) == ["loss", "mfu"]


@pytest.mark.slow
def test_a_run_is_plotted(micro_settings, tmp_path: Path, capsys):
    train(micro_settings(training={"max_steps": 2, "eval_every": 1}))
    picture = tmp_path / "pictures" / "curves.png"
    assert main(["plot", str(tmp_path / "run"), "--out", str(picture)]) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    whole = Image.open(picture)
    assert main(["plot", str(tmp_path / "run"), "--out", str(picture), "--fields", "loss_video"]) == 0
    assert Image.open(picture).size < whole.size
    assert main(["plot", str(tmp_path / "run"), "--out", str(picture), "--all"]) == 0
    assert Image.open(picture).size > whole.size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["there is no log nowhere", "runs/tiny"]),
        (["empty.jsonl"], ["has no line of a step yet"]),
        (["odd.jsonl"], ["odd.jsonl is no log of a run", "has no step"]),
        (["list.jsonl"], ["list.jsonl has no line of a step yet"]),
        (["text.jsonl"], ["loss of step 1 is no number: 'high'"]),
        (["a", "--fields", "los"], ["no log has los", "loss_video, frame_loss_video"]),
        (["a", "--fields", "loss_video", "--all"], ["--fields and --all exclude each other"]),
        (["a", "--out", "curves.bmp"], ["curves.bmp", ".png, .svg, .pdf"]),
    ],
)
def test_what_cannot_be_plotted(logs: list[str], tmp_path: Path, monkeypatch, capsys, arguments: list[str], words: list[str]):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text('{"event": "start", "step": 0}\n')
    for name, line in {"odd": '{"loss": 1.0}', "list": "[1]", "text": '{"step": 1, "loss": "high"}'}.items():
        Path(f"{name}.jsonl").write_text(line + "\n")
    assert main(["plot", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert all(word in said for word in words)
    assert not Path("curves.png").exists()


def test_without_matplotlib(logs: list[str], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", *logs, "--out", str(tmp_path / "c.png")]) == 2
    assert "pip install 'lumos-video[plot]'" in capsys.readouterr().err
