"""Heat maps of experiments whose variants lie in a grid."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from lumos.errors import UserError
from lumos.evaluation.experiments.heat_maps import cells, draw_heat_maps, in_order
from lumos.evaluation.experiments.settings import load
from lumos.video.io import read_image

GRID = {"rows": "scale of the picture", "columns": "scale of the text", "panels": "renormalisation"}
PLACES = {"none": [1, 1], "a": [1, 2.5, "off"], "b": [2.5, 2.5, "off"], "c": [2.5, 2.5, "each sample"]}


def test_a_variant_without_a_panel_is_in_all():
    variants = {name: {"at": at} for name, at in PLACES.items()}
    assert cells(variants) == {
        "off": {(1, 1): variants["none"], (1, 2.5): variants["a"], (2.5, 2.5): variants["b"]},
        "each sample": {(1, 1): variants["none"], (2.5, 2.5): variants["c"]},
    }
    assert cells({"x": {"at": [1, 2]}}) == {"": {(1, 2): {"at": [1, 2]}}}
    assert in_order([7.5, "spaced", 1, "all", 2.5, "spaced"]) == [1, 2.5, 7.5, "spaced", "all"]


def test_axes_are_named_in_words(tmp_path: Path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib.figure")
    words: list[str] = []
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda self, path, **_: words.extend(texts(self)) or path.touch())
    draw_heat_maps(result(), ["all", "frechet"], tmp_path / "x.png")
    titles = {"prompts followed\nrenormalisation: off", "prompts followed\nrenormalisation: each sample",
              "Fréchet distance\nrenormalisation: off", "Fréchet distance\nrenormalisation: each sample"}  # fmt: skip
    assert titles | {"scale of the picture", "scale of the text", "Which scale?"} <= set(words)


def test_long_names_of_columns_do_not_overlap(tmp_path: Path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda self, path, **_: drawn.append(self) or path.touch())
    columns = ("spaced", "shallow and least", "scratch")
    variants = {name: {"at": ["none", name], "summary": {"all": [0.1 * n, 0.0]}} for n, name in enumerate(columns)}
    grid = {"rows": "losses", "columns": "removed by", "panels": ""}
    draw_heat_maps({"question": "Which?", "grid": grid, "names": {}, "variants": variants}, ["all"], tmp_path / "x.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    labels = figure.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["spaced", "shallow\nand least", "scratch"]
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_a_figure_that_no_variant_has_is_left_out(tmp_path: Path):
    pytest.importorskip("matplotlib")
    draw_heat_maps(result(), ["all", "frechet"], tmp_path / "two.png")
    draw_heat_maps(result(), ["all", "psnr"], tmp_path / "one.png")
    two, one = (read_image(tmp_path / f"{name}.png") for name in ("two", "one"))
    assert one.shape[0] == two.shape[0]
    assert one.shape[1] < two.shape[1]


def result() -> dict:
    variants = {name: {"at": at, "summary": {"all": [0.1 * n, 0.0], "frechet": [2.0 + n, 0.1]}}
                for n, (name, at) in enumerate(PLACES.items())}  # fmt: skip
    return {"question": "Which scale?", "grid": GRID, "names": {}, "variants": variants}


def texts(figure) -> list[str]:
    of_axes = [(axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
    return [figure.get_suptitle(), *(text for three in of_axes for text in three)]


@pytest.mark.parametrize(("grid", "places", "message"), [
    (None, [[1, 1], []], "variants.a.at has no effect without grid"),
    ({"rows": "x"}, [[1, 1], [1, 2]], "grid needs titles of its rows and columns"),
    ({"rows": "x", "columns": "y"}, [[1, 1], [1, 2, "off"]], r"variants.b.at is .*give a row, a column$"),
    (GRID, [[1, 1], [1]], "give a row, a column and, if it has one of its own, a panel"),
    (GRID, [[1, 1, "off"], [1, 1, "off"]], "variants 'a' and 'b' are both at"),
])  # fmt: skip
def test_mistakes_in_a_grid(grid, places, message, tmp_path: Path):
    path = tmp_path / "study.yaml"
    variants = dict(zip("ab", ({"at": at} for at in places), strict=True))
    path.write_text(yaml.safe_dump({"prompts": [], "grid": grid, "variants": variants}))
    with pytest.raises(UserError, match=message):
        load(path)
