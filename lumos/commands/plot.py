"""`plot`: draw the curves of one or more runs as one picture, from their log.jsonl."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from lumos.errors import as_text, drawable, needing_matplotlib, printable, shown

SUFFIXES = (".png", ".svg", ".pdf")
FOUR = ("loss", "loss_video", "grad_norm", "tokens_per_second", "lr", "loss_image", "seconds")
"""Panels in the order of how much they matter: the first four of them that the logs have are drawn."""
NUMBER = 4
HIGHER_IS_BETTER = ("tokens_per_second", "mfu")
UNITS = {
    "tokens_per_second": "tokens a second", "seconds": "seconds a step", "data_wait": "seconds a step",
    "mfu": "share of the peak", "flops": "FLOPs a step", "lr": "learning rate", "grad_norm": "norm", "memory_bytes": "bytes",
}  # fmt: skip
Curves = dict[str, list[tuple[int, float | list[float | None]]]]  # field: [(step, value)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, or a log.jsonl")
    add("--out", default="curves.png", help=f"picture to write ({', '.join(SUFFIXES)}); default: %(default)s")
    add("--fields", nargs="+", help="fields to draw, for example loss grad_norm mfu; default: the four that matter most")
    add("--all", action="store_true", help="draw all fields in the logs")


def run(args: argparse.Namespace) -> None:
    from lumos.errors import UserError, instead
    from lumos.files import check_writable

    if not args.out.lower().endswith(SUFFIXES):
        raise UserError(f"--out {args.out} has no suffix of {', '.join(SUFFIXES)}")
    check_writable(args.out)
    runs = {name: read_curves(name) for name in args.runs}
    known = list(dict.fromkeys(panel_of(field) for curves in runs.values() for field in curves))
    if unknown := [field for field in args.fields or () if field not in known]:
        raise UserError(f"--fields: no log has {as_text(unknown[0])}{as_text(instead(unknown[0], known, 'there are'), 1000)}")
    if args.fields and args.all:
        raise UserError("--fields and --all exclude each other; give one of them")
    draw(runs, args.fields or (known if args.all else most_important(known)), args.out)
    print(printable(args.out))


def most_important(known: Sequence[str]) -> list[str]:
    """Return at most four panels: those of FOUR that the logs have, in that order, and then others."""
    return [*(name for name in FOUR if name in known), *(name for name in known if name not in FOUR)][:NUMBER]


def unit_of(panel: str) -> str:
    """Return the unit of a panel's values."""
    return UNITS.get(panel, "loss" if "loss" in panel else "")


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
            most = max(len(values) for _, values in rows)  # a run may go on with clips of another length
            of_each = [
                [(step, values[k]) for step, values in rows if k < len(values) and values[k] is not None] for k in range(most)
            ]
            used = [k for k, points in enumerate(of_each) if points]
            for nth, k in enumerate(used):
                points = of_each[k]
                label = f"{name} {field}" + (f" {k}" if most > 1 else "")
                yield number, drawable(label), style, 1 - 0.8 * nth / len(used), points


def best_of(curves: Curves, panel: str) -> tuple[str, float, int] | None:
    """Return (field, best value, its step) of a panel: of validation if there is one, and of averaged weights if there are some.

    The best value is the highest of a speed, else the lowest. None for fields with several values.
    """
    single = [field for field, points in curves.items() if not any(isinstance(value, list) for _, value in points)]
    fields = [field for field in single if panel_of(field) == panel]
    if not fields:
        return None
    field = max(fields, key=lambda name: (name.startswith("val_"), name.endswith("_ema")))
    pick = max if panel in HIGHER_IS_BETTER else min
    step, value = pick(curves[field], key=lambda point: point[1])
    return field, value, step


def smoothed(points: list[tuple[int, float]], width: int) -> list[tuple[int, float]]:
    """Return each value replaced by the mean of the last `width` values up to it."""
    values = [value for _, value in points]
    sums = [0.0, *itertools.accumulate(values)]
    starts = (max(0, end - width) for end in range(1, len(values) + 1))
    return [
        (step, (sums[end] - sums[start]) / (end - start))
        for (step, _), end, start in zip(points, range(1, len(values) + 1), starts, strict=True)
    ]


def draw(runs: dict[str, Curves], panels: list[str], out: str) -> None:
    """Write a picture with one panel for each field; each run has its own colour.

    A training curve of many points is drawn lightly, with its mean over a fiftieth of them. A curve of one point is a dot.
    """
    from lumos.files import replacing

    with needing_matplotlib("plot"):
        from matplotlib.figure import Figure
    across = min(2 if len(panels) <= NUMBER else 3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(6.0 * across, 4.0 * down), layout="constrained")
    for n, panel in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, n)
        for number, label, style, opacity, points in lines_of(runs, panel):
            color, width = f"C{number}", len(points) // 50
            if width > 1 and style == "-":
                axes.plot(*zip(*points, strict=True), style, color=color, alpha=0.25 * opacity, lw=1)
                label, points = f"{label} (mean of {width})", smoothed(points, width)
            single = {"linestyle": "none", "marker": "o", "ms": 6} if len(points) == 1 else {"linestyle": style, "lw": 1.5}
            axes.plot(*zip(*points, strict=True), color=color, alpha=opacity, label=label, **single)
        best = [(name, found) for name, curves in runs.items() if (found := best_of(curves, panel))]
        said = [f"{name if len(runs) > 1 else 'best'}: {value:.4g} at step {step:,}" for name, (_, value, step) in best]
        axes.set_title("\n".join(map(drawable, [panel, *said])), fontsize=11)
        axes.set_xlabel("step", fontsize=10)
        axes.set_ylabel(drawable(unit_of(panel)), fontsize=10)
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, framealpha=0.5)
    with replacing(out) as temporary:
        figure.savefig(temporary, format=Path(out).suffix[1:].lower(), dpi=110)
