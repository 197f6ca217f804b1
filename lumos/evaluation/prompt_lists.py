"""The official prompt lists of VBench, VBench-I2V and GenEval, and the file names that each benchmark requires.

A sample is one of the clips or pictures that a benchmark wants for a prompt.

Sources: github.com/Vchitect/VBench (prompts/README.md, vbench/__init__.py, vbench2_beta_i2v/README.md) and
github.com/djghosh13/geneval (README.md, evaluation/evaluate_images.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lumos.errors import UserError, shown
from lumos.files import parse_json, read_prompts, read_text

VIDEO_SAMPLES = 5
FLICKER_SAMPLES = 25
"""Clips of a prompt for temporal_flickering.

VBench drops the clips with motion and scores five of the others.
"""
PICTURE_SAMPLES = 4
LONGEST_NAME = 255
"""The most bytes of a file name on common file systems."""
NOT_IN_NAMES = "/\0" + ('<>:"\\|?*' if os.name == "nt" else "")


@dataclass(frozen=True)
class Entry:
    """One prompt of a list with the files of its samples.

    Paths are relative to the folder of results.
    """

    prompt: str
    files: tuple[str, ...]  # a path for each sample, in order
    row: dict[str, Any]  # the whole entry of the list
    caption: str  # the text for the model: the prompt, or a rewritten prompt
    image: str | None = None  # file name in the folder of images
    notes: tuple[tuple[str, str], ...] = ()  # (path, text) of further files that the benchmark wants


@dataclass(frozen=True)
class PromptBenchmark:
    """A benchmark and the form of its prompt list."""

    title: str
    list_file: str
    folder: str  # folder of the samples, which the official evaluation reads; it may hold nothing else
    read: Callable[[str, int | None], list[Entry]]  # (text of the list, samples per prompt or None) -> entries
    pictures: bool = False  # the samples are pictures, not clips
    images: bool = False  # each clip begins with a given picture


def read_list(
    benchmark: PromptBenchmark,
    path: str | Path,
    *,
    samples: int | None = None,
    captions: str | Path | None = None,
    caption_key: str | None = None,
) -> list[Entry]:
    """Return the entries of a list, each prompt once.

    samples: the number of samples of every prompt; None: as many as the benchmark wants. captions:
    a file with other texts for the model, see `read_captions`. caption_key: a field of the list
    that holds other texts for the model. UserError for a file of another form, for a prompt without
    a caption, and for a prompt that cannot be used as a file name.
    """
    if samples is not None and samples < 1:
        raise UserError(f"samples {samples} is not allowed; give at least 1")
    if captions is not None and caption_key is not None:
        raise UserError("captions come from a file or from a field of the list; give captions or caption_key, not both")
    entries = benchmark.read(read_text(path, f"the prompts of {benchmark.title}, its {benchmark.list_file}"), samples)
    if not entries:
        raise UserError(f"{path} holds no prompts")
    if caption_key is not None:
        told = [entry.row.get(caption_key) for entry in entries]
    elif captions is not None:
        told = read_captions(captions, entries)
    else:
        told = [entry.prompt for entry in entries]
    once: dict[str, Entry] = {}
    for entry, caption in zip(entries, told, strict=True):
        if not isinstance(caption, str) or not caption.strip():
            where = f"in {captions}" if captions is not None else f"under {shown(caption_key)} in {path}"
            raise UserError(f"there is no caption for the prompt {shown(entry.prompt)} {where}; give one for each")
        once.setdefault(entry.files[0], replace(entry, caption=caption))
    return list(once.values())


def read_captions(path: str | Path, entries: Sequence[Entry]) -> list[Any]:
    """Return the caption of each entry, or None for an entry without one.

    The file is a .json object {prompt: caption}, in which a prompt may end in .mp4, or a text with
    a line for each entry of the list, in the same order, like VBench's all_dimension_longer.txt.
    UserError for another form or number of lines.
    """
    text = read_prompts(path, "captions")
    if Path(path).suffix == ".json":
        table = parse_json(text, str(path))
        if not isinstance(table, dict):
            raise UserError(f"{path} must be a JSON object {{prompt: caption}}, or a text with one caption per line")
        return [table.get(entry.prompt, table.get(f"{entry.prompt}.mp4")) for entry in entries]
    lines = [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
    if len(lines) != len(entries):
        raise UserError(f"{path} has {len(lines)} lines, but the list has {len(entries)} entries; give a line for each")
    return lines


def read_vbench(text: str, samples: int | None) -> list[Entry]:
    """Return the entries of VBench_full_info.json, a list of {"prompt_en", "dimension": [...]}.

    Clip i of a prompt is the file <prompt>-<i>.mp4. All entries of a prompt share its clips, so a
    prompt gets FLICKER_SAMPLES clips if any of its entries has the dimension temporal_flickering.
    """
    rows = check_rows(parse_json(text, "the prompt list"), {"prompt_en": str, "dimension": list})
    flicker = {row["prompt_en"] for row in rows if "temporal_flickering" in row["dimension"]}
    return [clips(row, samples or (FLICKER_SAMPLES if row["prompt_en"] in flicker else VIDEO_SAMPLES)) for row in rows]


def read_vbench_i2v(text: str, samples: int | None) -> list[Entry]:
    """Return the entries of vbench2_i2v_full_info.json, which also have an "image_name".

    Every prompt gets VIDEO_SAMPLES clips, because this benchmark drops no clips.
    """
    rows = check_rows(parse_json(text, "the prompt list"), {"prompt_en": str, "dimension": list, "image_name": str})
    return [clips(row, samples or VIDEO_SAMPLES) for row in rows]


def read_geneval(text: str, samples: int | None) -> list[Entry]:
    """Return the entries of evaluation_metadata.jsonl, a line {"tag", "prompt", ...} for each prompt.

    The samples of line n are written into <n>/samples/, and the line itself into
    <n>/metadata.jsonl.
    """
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = check_rows([parse_json(line, f"line {number}") for number, line in numbered], {"tag": str, "prompt": str})
    lines = [line for _, line in numbered]
    entries = []
    for number, (line, row) in enumerate(zip(lines, rows, strict=True)):
        files = tuple(f"{number:05d}/samples/{i:04d}.png" for i in range(samples or PICTURE_SAMPLES))
        notes = ((f"{number:05d}/metadata.jsonl", line + "\n"),)
        entries.append(Entry(row["prompt"], files, row, row["prompt"], notes=notes))
    return entries


BENCHMARKS = {
    "vbench": PromptBenchmark("VBench", "VBench_full_info.json", "videos", read_vbench),
    "vbench-i2v": PromptBenchmark("VBench-I2V", "vbench2_i2v_full_info.json", "videos", read_vbench_i2v, images=True),
    "geneval": PromptBenchmark("GenEval", "evaluation_metadata.jsonl", "images", read_geneval, pictures=True),
}


def clips(row: dict[str, Any], samples: int) -> Entry:
    """Return the entry of a row of VBench's list.

    VBench finds a clip by the prompt in its file name. UserError for a prompt that cannot be used
    as a file name.
    """
    prompt = row["prompt_en"]
    bad = [character for character in NOT_IN_NAMES if character in prompt]
    length = len(f"{prompt}-{samples - 1}.mp4".encode())
    if bad or length > LONGEST_NAME:
        why = f"holds {shown(bad[0])}" if bad else f"would be a name of {length} bytes, {LONGEST_NAME} are possible"
        raise UserError(
            f"VBench looks for clips in files named after the prompt, but {shown(prompt[:60])} {why}; shorten it in the list, and "
            "give the model the long prompt with --captions"
        )
    return Entry(prompt, tuple(f"{prompt}-{i}.mp4" for i in range(samples)), row, prompt, row.get("image_name"))


def check_rows(rows: Any, needed: dict[str, type], what: str = "the prompt list") -> list[dict[str, Any]]:
    """Return `rows` if it is a list of objects with these fields, no text of them blank; UserError otherwise."""
    form = f"a list of objects with {', '.join(needed)}"
    if not isinstance(rows, list):
        raise UserError(f"{what} is a JSON {type(rows).__name__}; it must be {form}")
    for number, row in enumerate(rows):
        for name, kind in needed.items():
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, kind) or (kind is str and not value.strip()):
                raise UserError(f"entry {number} of {what} has no {name}; it must be {form}")
    return rows
