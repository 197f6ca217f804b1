"""`inspect`: show what a folder of shards holds: counts, sizes, durations, captions, use of the codes, a contact sheet."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from lumos.cli import add_json
from lumos.commands.counts import MAX_CLIPS, check_counts
from lumos.progress import LOGGER

LABEL_LENGTH = 300
"""The maximum number of characters of a clip's name and caption on the sheet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("shards", help="folder that `ingest` wrote, or its URL")
    add("--sheet", help="PNG with evenly spaced clips, decoded by the tokenizer; default: sheet.png in a local folder")
    add("--no-sheet", action="store_true", help="write no sheet")
    add("--sheet-clips", type=int, help="clips on the sheet; default: 12")
    add("--tokenizer", help="folder of the video tokenizer for the sheet; default: the tokenizer that ingest used")
    add("--captions", type=int, default=5, help="number of captions to print; default: %(default)s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from lumos.data.shards import format as shards
    from lumos.data.shards.description import check_count, read_description
    from lumos.data.shards.remote import location
    from lumos.errors import RunError, UserError, printable
    from lumos.evaluation.quality import code_use

    folder = location(args.shards)
    description = read_description(folder)
    sheet_clips = 12 if args.sheet_clips is None else args.sheet_clips
    check_counts(args, sheet_clips=(1, MAX_CLIPS), captions=(0, MAX_CLIPS))
    sheet, why_none = _where(args, folder)
    total = sum(sum(shards.read_facts(path).rows) for path in shards.shard_paths(folder))
    check_count(folder, total)
    if not total:
        raise UserError(f"{folder} holds no clips yet; run `python -m lumos ingest` into it")
    counts = np.zeros(description["tokenizer"]["num_codes"], dtype=np.int64)
    sizes: Counter = Counter()
    lengths: Counter = Counter()
    words, seconds, tokens, shown = 0, 0.0, 0, []
    for number, row in enumerate(shards.read_shards(folder)):
        counts += np.bincount(row["codes"].reshape(-1), minlength=len(counts))
        sizes[f"{row['width']}x{row['height']}"] += 1
        lengths[row["num_frames"]] += 1
        words += len(row["caption"].split())
        seconds += row["num_frames"] / row["fps"] if row["num_frames"] > 1 else 0
        tokens += row["codes"].size
        if number * sheet_clips // total != (number - 1) * sheet_clips // total:
            shown.append(row)
    used, perplexity = code_use(counts)
    summary: dict[str, Any] = {
        "shards": len(shards.shard_paths(folder)), "clips": total - lengths[1], "pictures": lengths[1],
        "hours": round(seconds / 3600, 4), "frames_of_a_clip": dict(sorted(lengths.items())), "sizes": dict(sizes.most_common()),
        "codes": tokens, "caption_words": round(words / total, 1), "codes_used": round(used, 4),
        "code_perplexity": round(perplexity, 1),
        "tokenizer": description["tokenizer"], "settings": description["settings"],
    }  # fmt: skip
    for name, value in summary.items():
        told = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(printable(f"{name:18}{told}"))
    for row in shown[: args.captions]:
        print(printable(f"  {row['id']}: {row['caption']}"))
    if sheet:
        try:
            _draw(shown, args.tokenizer or description["tokenizer"].get("folder"), description, sheet)
            print(printable(f"sheet: {sheet}"))
        except (UserError, RunError, OSError) as error:
            if args.sheet or args.tokenizer:
                raise
            why_none = f"{error}; give --tokenizer"  # no error: the sheet is a default, and shards may come without the tokenizer
    if why_none:
        LOGGER.warning(printable(f"no sheet: {' '.join(why_none.split())}"))
    return summary


def _where(args: argparse.Namespace, folder: Any) -> tuple[Path | None, str | None]:
    """Return (path of the sheet, None), or (None, reason why there is no sheet), or (None, None) with --no-sheet.

    Raises UserError if the file --sheet cannot be written or an option has no effect.
    """
    from lumos.data.shards.description import SHEET
    from lumos.errors import UserError
    from lumos.files import check_outputs, check_writable

    if args.no_sheet:
        given = {"--sheet": args.sheet, "--sheet-clips": args.sheet_clips, "--tokenizer": args.tokenizer}
        if without := [name for name, value in given.items() if value is not None]:
            raise UserError(f"{', '.join(without)} has no effect with --no-sheet; leave one of them out")
        return None, None
    if args.sheet is not None:
        check_outputs([args.sheet])
        return Path(args.sheet), None
    if not isinstance(folder, Path):
        return None, f"{folder} is not on this machine; name a file with --sheet"
    try:
        check_writable(folder / SHEET)
    except UserError as error:
        return None, f"{error} with --sheet"
    return folder / SHEET, None


def _draw(rows: list[dict[str, Any]], tokenizer: str, description: dict[str, Any], sheet: Path) -> None:
    import torch

    from lumos.data.shards.description import check_tokenizer
    from lumos.errors import printable
    from lumos.video.frames import contact_sheet, to_uint8
    from tokenizer import VideoTokenizer

    model = VideoTokenizer.from_pretrained(tokenizer)
    check_tokenizer(description, model, "--tokenizer")
    with torch.no_grad():
        clips = [to_uint8(model.decode(torch.from_numpy(row["codes"].astype("int64"))[None])[0]) for row in rows]
    labels = [printable(f"{row['id']}: {row['caption']}"[:LABEL_LENGTH]) for row in rows]
    contact_sheet(clips, labels, sheet)
