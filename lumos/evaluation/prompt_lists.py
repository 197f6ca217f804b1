"""The prompt lists of VBench, VBench-I2V and GenEval in their official form, and where each benchmark looks for its files.

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
from lumos.files import parse_json, read_text

VIDEO_SAMPLES = 5
FLICKER_SAMPLES = 25
"""Clips of a temporal_flickering prompt: VBench drops those that move and scores five of the rest."""
PICTURE_SAMPLES = 4
LONGEST_NAME = 255
"""Bytes of a file name that common file systems keep."""
NOT_IN_NAMES = "/\0" + ('<>:"\\|?*' if os.name == "nt" else "")


@dataclass(frozen=True)
class Entry:
    """One prompt of a list and the files that its samples go to, in order; paths are from the folder of results."""

    prompt: str
    files: tuple[str, ...]
    row: dict[str, Any]  # all that the list says of it
    caption: str  # what the model is told: the prompt, or a rewritten one
    image: str | None = None  # file in the folder of images
    notes: tuple[tuple[str, str], ...] = ()  # (path, text) of files that lie beside the samples


@dataclass(frozen=True)
class Benchmark:
    """`folder` is what the official evaluation is pointed at; nothing but results may lie in it."""

    title: str
    list_file: str
    folder: str
    read: Callable[[str, int | None], list[Entry]]
    pictures: bool = False  # one frame each, not clips
    images: bool = False  # each clip begins with a given picture


def read_list(
    benchmark: Benchmark,
    path: str | Path,
    *,
    samples: int | None = None,
    captions: str | Path | None = None,
    caption_key: str | None = None,
) -> list[Entry]:
    """The entries of a list, each prompt once.

    samples: of every prompt; None: as many as the benchmark wants. What the model is told instead of the prompts comes from
    a file, `captions`, or from a field of the list itself. UserError for a file of another form, and for a prompt that
    cannot name a file.
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
    """What the model is told for each entry, None where nothing is found.

    A .json object {prompt: caption}, in which a prompt may end in .mp4; or text with a line for each entry of the list, in its
    order, as VBench's all_dimension_longer.txt has them.
    """
    text = read_text(path, "captions")
    if Path(path).suffix == ".json":
        table = parse_json(text, str(path))
        if not isinstance(table, dict):
            raise UserError(f"{path} must be a JSON object {{prompt: caption}}, or text with one caption a line")
        return [table.get(entry.prompt, table.get(f"{entry.prompt}.mp4")) for entry in entries]
    lines = text.removesuffix("\n").split("\n")
    if len(lines) != len(entries):
        raise UserError(f"{path} has {len(lines)} lines, but the list has {len(entries)} entries; give a line for each")
    return lines


def read_vbench(text: str, samples: int | None) -> list[Entry]:
    """VBench_full_info.json: a list of {"prompt_en", "dimension": [...]}; clips go to <prompt>-<i>.mp4.

    All entries of a prompt share its clips, so it has more of them if any entry asks for temporal_flickering.
    """
    rows = check_rows(parse_json(text, "the prompt list"), {"prompt_en": str, "dimension": list})
    flicker = {row["prompt_en"] for row in rows if "temporal_flickering" in row["dimension"]}
    return [clips(row, samples or (FLICKER_SAMPLES if row["prompt_en"] in flicker else VIDEO_SAMPLES)) for row in rows]


def read_vbench_i2v(text: str, samples: int | None) -> list[Entry]:
    """vbench2_i2v_full_info.json: entries with an "image_name" too. Five clips of each: this benchmark drops none."""
    rows = check_rows(parse_json(text, "the prompt list"), {"prompt_en": str, "dimension": list, "image_name": str})
    return [clips(row, samples or VIDEO_SAMPLES) for row in rows]


def read_geneval(text: str, samples: int | None) -> list[Entry]:
    """evaluation_metadata.jsonl: a line {"tag", "prompt", ...} each; line n goes to <n>/samples/, itself beside them."""
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = check_rows([parse_json(line, f"line {number}") for number, line in numbered], {"tag": str, "prompt": str})
    lines = [line for _, line in numbered]
    entries = []
    for number, (line, row) in enumerate(zip(lines, rows, strict=True)):
        files = tuple(f"{number:05d}/samples/{i:04d}.png" for i in range(samples or PICTURE_SAMPLES))
        notes = ((f"{number:05d}/metadata.jsonl", line + "\n"),)
        entries.append(Entry(row["prompt"], files, row, row["prompt"], notes=notes))
    return entries


BENCHMARKS = {
    "vbench": Benchmark("VBench", "VBench_full_info.json", "videos", read_vbench),
    "vbench-i2v": Benchmark("VBench-I2V", "vbench2_i2v_full_info.json", "videos", read_vbench_i2v, images=True),
    "geneval": Benchmark("GenEval", "evaluation_metadata.jsonl", "images", read_geneval, pictures=True),
}


def clips(row: dict[str, Any], samples: int) -> Entry:
    """The entry of a VBench row. VBench finds a clip by the prompt in its name; UserError for one that no file can have."""
    prompt = row["prompt_en"]
    bad = [character for character in NOT_IN_NAMES if character in prompt]
    length = len(f"{prompt}-{samples - 1}.mp4".encode())
    if bad or length > LONGEST_NAME:
        why = f"holds {shown(bad[0])}" if bad else f"would be a name of {length} bytes, {LONGEST_NAME} are possible"
        raise UserError(
            f"VBench looks for clips in files named after the prompt, but {shown(prompt[:60])} {why}; shorten it in the list, and "
            "give the model the long one with --captions"
        )
    return Entry(prompt, tuple(f"{prompt}-{i}.mp4" for i in range(samples)), row, prompt, row.get("image_name"))


def check_rows(rows: Any, needed: dict[str, type], what: str = "the prompt list") -> list[dict[str, Any]]:
    """A list of objects with these fields, no text of them blank; UserError otherwise."""
    form = f"a list of objects with {', '.join(needed)}"
    if not isinstance(rows, list):
        raise UserError(f"{what} is a JSON {type(rows).__name__}; it must be {form}")
    for number, row in enumerate(rows):
        for name, kind in needed.items():
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, kind) or (kind is str and not value.strip()):
                raise UserError(f"entry {number} of {what} has no {name}; it must be {form}")
    return rows
