"""The totals of VBench, VBench-I2V and GenEval from the files that their own evaluations write.

Constants and formulas: github.com/Vchitect/VBench, scripts/constant.py, cal_final_score.py and cal_i2v_final_score.py;
github.com/djghosh13/geneval, evaluation/summary_scores.py. VBench counts a missing dimension as 0; here there is no total then.
"""

from __future__ import annotations

import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumos.errors import UserError, as_text, reason_of, shown
from lumos.evaluation.prompt_lists import check_rows
from lumos.files import MAX_DOCUMENT_BYTES, parse_json, read_text


@dataclass(frozen=True)
class Dimension:
    """A raw score x counts as (x - low) / (high - low), `weight` times in its part."""

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


SUBJECT, BACKGROUND, SMOOTHNESS = Dimension(0.1462), Dimension(0.2615), Dimension(0.706, 0.9975)
DYNAMIC = Dimension(weight=0.5)
PARTS: dict[str, dict[str, tuple[float, dict[str, Dimension]]]] = {
    "vbench": {
        "quality": (4.0, {
            "subject_consistency": SUBJECT, "background_consistency": BACKGROUND, "temporal_flickering": Dimension(0.6293),
            "motion_smoothness": SMOOTHNESS, "dynamic_degree": DYNAMIC, "aesthetic_quality": Dimension(),
            "imaging_quality": Dimension(),
        }),
        "semantic": (1.0, {
            "object_class": Dimension(), "multiple_objects": Dimension(), "human_action": Dimension(), "color": Dimension(),
            "spatial_relationship": Dimension(), "scene": Dimension(high=0.8222), "appearance_style": Dimension(0.0009, 0.2855),
            "temporal_style": Dimension(high=0.364), "overall_consistency": Dimension(high=0.364),
        }),
    },
    "vbench-i2v": {
        "quality": (1.0, {
            "subject_consistency": SUBJECT, "background_consistency": BACKGROUND, "motion_smoothness": SMOOTHNESS,
            "dynamic_degree": DYNAMIC, "aesthetic_quality": Dimension(), "imaging_quality": Dimension(),
        }),
        "i2v": (1.0, {
            "camera_motion": Dimension(weight=0.1), "i2v_subject": SUBJECT, "i2v_background": BACKGROUND,
        }),
    },
}  # fmt: skip
"""benchmark -> part -> (its weight in the total, its dimensions)."""

UNCOUNTED = {"vbench": (), "vbench-i2v": ("temporal_flickering",)}
"""Dimensions that a benchmark's list names and its total leaves out."""

GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def vbench_totals(benchmark: str, scores: Mapping[str, float]) -> dict[str, Any]:
    """{dimensions: {name: {score, normalized}}, quality, semantic or i2v, total, missing}; all from 0 to 1.

    A part of which a dimension is missing is None, and so is the total then. UserError for a score that cannot be one.
    """
    parts = PARTS[benchmark]
    known = [name for _, dimensions in parts.values() for name in dimensions]
    for name, score in scores.items():
        if name not in known and name not in UNCOUNTED[benchmark]:
            raise UserError(f"{as_text(name)} is no dimension of {benchmark}; those are {', '.join(known)}")
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise UserError(f"{name} has the score {shown(score)}; the official files hold scores from 0 to 1")
    read: dict[str, dict[str, float]] = {}
    totals: dict[str, float | None] = {}
    for part, (_, dimensions) in parts.items():
        for name, d in dimensions.items():
            if name in scores:
                read[name] = {"score": scores[name], "normalized": (scores[name] - d.low) / (d.high - d.low)}
        whole = all(name in scores for name in dimensions)
        totals[part] = mean((read[name]["normalized"], d.weight) for name, d in dimensions.items()) if whole else None
    whole = None not in totals.values()
    total = mean((totals[part], weight) for part, (weight, _) in parts.items()) if whole else None
    missing = [name for name in known if name not in scores]
    return {"dimensions": read, **totals, "total": total, "missing": missing}


def geneval_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{tasks: {tag: {score, correct, images}}, images, prompts, prompts_ever_right, total, missing} of results.jsonl's lines.

    total: mean of the tasks' shares of right pictures, whatever their sizes; None if one of the six tasks is missing.
    """
    by_task: dict[str, list[bool]] = defaultdict(list)
    by_prompt: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_task[row["tag"]].append(row["correct"])
        by_prompt[row["prompt"]].append(row["correct"])
    tasks = {tag: {"score": sum(r) / len(r), "correct": sum(r), "images": len(r)} for tag, r in by_task.items()}
    missing = [tag for tag in GENEVAL_TASKS if tag not in tasks]
    return {
        "tasks": tasks,
        "images": len(rows),
        "prompts": len(by_prompt),
        "prompts_ever_right": sum(any(right) for right in by_prompt.values()) / len(by_prompt),
        "total": None if missing else mean((task["score"], 1.0) for task in tasks.values()),
        "missing": missing,
    }


def mean(weighted: Iterable[tuple[float, float]]) -> float:
    """Mean of (value, weight) pairs."""
    pairs = list(weighted)
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def summarize(benchmark: str, paths: Sequence[str | Path]) -> dict[str, Any]:
    """Totals of the official result files: for VBench also folders and zips of them; for GenEval its results.jsonl."""
    if benchmark != "geneval":
        return vbench_totals(benchmark, read_scores(paths))
    rows: list[Any] = []
    for path in paths:
        lines = enumerate(read_text(path, "results of GenEval").split("\n"), 1)
        found = [parse_json(line, f"{path}, line {number},") for number, line in lines if line.strip()]
        rows += check_rows(found, {"tag": str, "prompt": str, "correct": bool}, str(path))
    if not rows:
        raise UserError(f"{', '.join(map(str, paths))} hold no results")
    return geneval_totals(rows)


def read_scores(paths: Sequence[str | Path]) -> dict[str, float]:
    """{dimension: score} of VBench's `*_eval_results.json`, each an object {dimension: [score, details...]}.

    Lists among the files (`*_full_info.json`) are passed over, as VBench does. UserError if two files disagree.
    """
    scores: dict[str, float] = {}
    origin: dict[str, str] = {}
    for name, text in result_files(paths):
        data = parse_json(text, name)
        for dimension, value in data.items() if isinstance(data, dict) else ():
            if not isinstance(value, list) or not value:
                raise UserError(f"{name} is no result of VBench: {as_text(dimension)} is {shown(value, 60)}, not [score, details]")
            if dimension in scores and scores[dimension] != value[0]:
                first = f"{shown(scores[dimension], 60)} in {origin[dimension]}"
                raise UserError(f"{as_text(dimension)} is {first}, but {shown(value[0], 60)} in {name}; leave one out")
            scores[dimension], origin[dimension] = value[0], name
    if not scores:
        raise UserError(f"{', '.join(map(str, paths))} hold no results of VBench, which end in _eval_results.json")
    return scores


def result_files(paths: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    """(name, text) of each JSON file; hidden ones in folders and zips are left out."""
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(path.rglob("*.json")):
                if not file.name.startswith((".", "__")):
                    yield str(file), read_text(file, "results of VBench")
        elif path.suffix == ".zip":
            try:
                with zipfile.ZipFile(path) as archive:
                    for name in sorted(archive.namelist()):
                        if name.endswith(".json") and not Path(name).name.startswith(".") and not name.startswith("__"):
                            yield f"{path}/{as_text(name)}", read_entry(archive, name)
            except (OSError, ValueError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"cannot read {path} as a zip of results: {reason_of(error)}") from error
        else:
            yield str(path), read_text(path, "results of VBench")


def read_entry(archive: zipfile.ZipFile, name: str) -> str:
    """The text of a zip's entry; UserError if it unpacks to more than a document may have."""
    with archive.open(name) as entry:
        data = entry.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise UserError(f"{archive.filename}/{as_text(name)} has more than the {MAX_DOCUMENT_BYTES:,} bytes that are allowed")
    return data.decode("utf-8")


def table(summary: Mapping[str, Any]) -> str:
    """The summary as text, in percent."""
    lines = []
    for name, row in {**summary.get("dimensions", {}), **summary.get("tasks", {})}.items():
        extra = f"normalized {percent(row['normalized'])}" if "normalized" in row else f"{row['correct']} of {row['images']}"
        lines.append(f"{as_text(name):24}{percent(row['score'])}  {extra}")
    for name in ("quality", "semantic", "i2v", "total"):
        if name in summary:
            lines.append(f"{name:24}{percent(summary[name])}")
    if summary["missing"]:
        lines.append(f"missing, so no total: {', '.join(summary['missing'])}")
    return "\n".join(lines)


def percent(share: float | None) -> str:
    return "     -" if share is None else f"{100 * share:6.2f}"
