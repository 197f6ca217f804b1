"""The total scores of VBench, VBench-I2V and GenEval, computed from the files that the official evaluations write.

Constants and formulas: github.com/Vchitect/VBench, scripts/constant.py, cal_final_score.py and
cal_i2v_final_score.py; github.com/djghosh13/geneval, evaluation/summary_scores.py. VBench counts a
missing dimension as 0; here the total is None then.
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
from lumos.wording import text_of


@dataclass(frozen=True)
class Dimension:
    """The range and weight of a dimension: a score x is normalized to (x - low) / (high - low) and has this weight in its part."""

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
"""For each benchmark its parts, and for each part (weight in the total, dimensions by name)."""

UNCOUNTED = {"vbench": (), "vbench-i2v": ("temporal_flickering",)}
"""Dimensions that are in the prompt list of a benchmark but not in its total."""

GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def vbench_totals(benchmark: str, scores: Mapping[str, float]) -> dict[str, Any]:
    """Return {dimensions: {name: {score, normalized}}, quality, semantic or i2v, total, missing}.

    Scores are from 0 to 1. A part with a missing dimension is None, and then the total is None too.
    UserError for an unknown dimension, and for a score that is not a number from 0 to 1.
    """
    parts = PARTS[benchmark]
    known = [name for _, dimensions in parts.values() for name in dimensions]
    for name, score in scores.items():
        if name not in known and name not in UNCOUNTED[benchmark]:
            raise UserError(f"{as_text(name)} is no dimension of {benchmark}; its dimensions are {', '.join(known)}")
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
    """Return {tasks: {tag: {score, correct, images}}, images, prompts, prompts_ever_right, total, missing}.

    rows: the lines of results.jsonl. The score of a task is its share of right pictures. total: the
    mean of the scores of the tasks, which count equally; None if one of the six tasks is missing.
    prompts_ever_right: the share of prompts with at least one right picture.
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
    """Return the weighted mean of (value, weight) pairs."""
    pairs = list(weighted)
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def summarize(benchmark: str, paths: Sequence[str | Path]) -> dict[str, Any]:
    """Return the totals of official result files.

    paths: for VBench result files, or folders or zips of them; for GenEval its results.jsonl.
    UserError for files without results or of another form.
    """
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
    """Return {dimension: score} from VBench's `*_eval_results.json`, each an object {dimension: [score, details...]}.

    Files that hold a JSON list (`*_full_info.json`) are skipped, as VBench does. UserError if two
    files disagree.
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
    """Yield (name, text) of each JSON file. Hidden files in folders and zips are skipped."""
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
    """Return the text of an entry of a zip; UserError if it unpacks to more than MAX_DOCUMENT_BYTES."""
    with archive.open(name) as entry:
        data = entry.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise UserError(f"{archive.filename}/{as_text(name)} has more than the {MAX_DOCUMENT_BYTES:,} bytes that are allowed")
    return text_of(data)


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary as a text table, in percent."""
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
