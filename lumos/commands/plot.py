"""`plot`: draw the curves of one or more runs as one picture, from their log.jsonl."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from lumos.errors import as_text, drawable, needing_matplotlib, printable, shown

SUFFIXES = (".png", ".svg", ".pdf")
Curves = dict[str, list[tuple[int, float | list[float | None]]]]  # field: [(step, value)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, or a log.jsonl")
    add("--out", default="curves.png", help=f"picture to write ({', '.join(SUFFIXES)}); default: %(default)s")
    add("--fields", nargs="+", help="fields to draw, for example loss grad_norm mfu; default: all fields in the logs")


def run(args: argparse.Namespace) -> None:
    from lumos.errors import UserError
    from lumos.files import check_writable

    if not args.out.lower().endswith(SUFFIXES):
        raise UserError(f"--out {args.out} has no suffix of {', '.join(SUFFIXES)}")
    check_writable(args.out)
    runs = {name: read_curves(name) for name in args.runs}
    known = list(dict.fromkeys(panel_of(field) for curves in runs.values() for field in curves))
    if unknown := [field for field in args.fields or () if field not in known]:
        raise UserError(f"--fields: no log has {as_text(unknown[0])}; there are {as_text(', '.join(known), 1000)}")
    draw(runs, args.fields or known, args.out)
    print(printable(args.out))


def read_curves(name: str) -> Curves:
    """Return the fields in the log of a run. Raises UserError if there is no log, or if the log has no step yet."""
    from lumos.errors import UserError
    from lumos.training.logging import read_lines

    path = Path(name) / "log.jsonl" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise UserError(f"there is no log {path}; give the folder of a run, such as runs/tiny")
    curves: Curves = {}
    for line in read_lines(path):
        if "event" not in line and type(line.get("step")) is not int:
            raise UserError(f"{path} is no log of a run: {shown(line, 60)} has no step")
        for field, value in line.items() if "event" not in line else ():
            if not all(isinstance(v, int | float | None) for v in (value if isinstance(value, list) else [value])):
                raise UserError(f"{path}: {as_text(field)} of step {shown(line['step'])} is no number: {shown(value, 60)}")
            if field not in ("step", "time") and value is not None:
                curves.setdefault(field, []).append((line["step"], value))
    if not curves:
        raise UserError(f"{path} has no line of a step yet; a run writes one every training.log_every steps")
    return curves


def panel_of(field: str) -> str:
    """Return the panel of a field: a validation loss has the panel of the training loss of the same name."""
    return field.removeprefix("val_").removesuffix("_ema")


def lines_of(runs: dict[str, Curves], panel: str) -> Iterator[tuple[int, str, str, float, list[tuple[int, float]]]]:
    """Yield (number of the run, label, line style, opacity, points) of each line in a panel.

    Training is solid, validation dashed, validation with averaged weights dotted. A field with several
    values gives several lines, each lighter than the one before.
    """
    for number, (name, curves) in enumerate(runs.items()):
        for field in (field for field in curves if panel_of(field) == panel):
            style = ":" if field.endswith("_ema") else "--" if field.startswith("val_") else "-"
            rows = [(step, value if isinstance(value, list) else [value]) for step, value in curves[field]]
            used = [k for k in range(len(rows[0][1])) if any(values[k] is not None for _, values in rows)]
            for nth, k in enumerate(used):
                points = [(step, values[k]) for step, values in rows if values[k] is not None]
                label = f"{name} {field}" + (f" {k}" if len(rows[0][1]) > 1 else "")
                yield number, drawable(label), style, 1 - 0.8 * nth / len(used), points


def draw(runs: dict[str, Curves], panels: list[str], out: str) -> None:
    """Write a picture with one panel for each field; each run has its own colour."""
    from lumos.files import replacing

    with needing_matplotlib("plot"):
        from matplotlib.figure import Figure
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.5 * across, 3.2 * down), layout="constrained")
    for n, panel in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, n)
        for number, label, style, opacity, points in lines_of(runs, panel):
            mark = "." if len(points) == 1 else ""
            axes.plot(*zip(*points, strict=True), style + mark, color=f"C{number}", alpha=opacity, lw=1, label=label)
        axes.set_title(drawable(panel), fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=5, framealpha=0.5)
    with replacing(out) as temporary:
        figure.savefig(temporary, format=Path(out).suffix[1:].lower(), dpi=110)
