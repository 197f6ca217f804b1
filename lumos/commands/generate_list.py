"""`generate` for several clips: the rows of a list, or one prompt with several seeds. The model is loaded once."""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lumos.commands.counts import MAX_BATCH, MAX_CLIPS, MAX_SEED, check_counts
from lumos.commands.loading import (
    circumstances,
    ended_by_sigterm,
    given_arguments,
    hashed,
    load,
    metadata,
    model_sha256,
    out_of_memory_as,
    planned,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lumos.pipeline.base import VideoPipeline
    from lumos.prompt_lists.clips import ListedClip
    from lumos.prompt_lists.rows import PromptRow

BATCH_SIZE, SEED, OUTPUT_DIR = 4, 0, "outputs"
MAX_WORKERS = 10_000


@dataclass(frozen=True)
class Share:
    """The result of a process for its share of the clips: numbers of clips and of rows."""

    made: int
    failed: int
    clips: int
    rows: int
    bad_rows: int


def make_list(
    args: argparse.Namespace, everywhere: Callable[[argparse.Namespace], Share] | None = None
) -> dict[str, Any] | None:
    """Make several clips, print how many, and return that, or None in a process that does not print.

    everywhere: makes all shares; None makes that of this process.
    """
    from lumos.errors import RunError, printable
    from lumos.prompt_lists.results import sum_over_processes

    check_arguments(args)
    out = Path(args.output_dir or OUTPUT_DIR)
    share = make_share(args) if everywhere is None else everywhere(args)
    made, failed = sum_over_processes(share.made, share.failed)
    if speaks(args):
        print(printable(f"{out}  {made} made now  {share.clips} clips in all  {share.rows} rows"))
    if failed or share.bad_rows:
        bad = [f"{share.bad_rows} of {share.rows} rows are bad"] if share.bad_rows else []
        lacking = [f"{failed} clips could not be made"] if failed else []
        others = f"the other clips are in {out}" if failed < share.clips else "there are no others"
        raise RunError(f"{' and '.join(bad + lacking)}, as said above; {others}")
    return {"output_dir": str(out), "made": made, "clips": share.clips, "rows": share.rows} if speaks(args) else None


def speaks(args: argparse.Namespace) -> bool:
    """Return whether this process prints: of those of a launcher, which share a terminal, only the first one does."""
    from lumos.prompt_lists.results import parse_shard

    return parse_shard(args.shard)[0] == 1 or args.shard is not None


def make_share(args: argparse.Namespace, bars: bool = True) -> Share:
    """Make the clips of this process's share. bars: show a progress bar."""
    from lumos.errors import UserError, printable
    from lumos.progress import LOGGER
    from lumos.prompt_lists.clips import with_free_name
    from lumos.prompt_lists.results import only_shard, parse_shard

    shard, out = parse_shard(args.shard), Path(args.output_dir or OUTPUT_DIR)
    rows, defaults, seed = requested_rows(args)
    pipe, model = load(args)
    clips, problems, notes = check_rows(args, pipe, model, rows, defaults, seed, out)
    if len(rows) == len(problems) == 1:
        raise UserError(next(iter(problems.values())))
    told = [*problems.items(), *((line, f"note: {text}") for line, text in notes)]
    for line, said in told if speaks(args) else ():
        LOGGER.log(logging.ERROR if line in problems else logging.WARNING, printable(f"{where(args, line)}: {said}"))
    if not clips:
        raise UserError(f"none of the {len(rows)} rows of {args.prompts} can be made, for the reasons above")
    with ended_by_sigterm(), only_shard(out, shard):
        if has_default_names(args):  # again, as another process may have taken some before this one had the lock
            clips = [with_free_name(out, clip) for clip in clips]
        made, failed = make_clips(args, pipe, model, clips, shard, out, notes, bars)
    return Share(made, failed, len(clips), len(rows), len(problems))


def has_default_names(args: argparse.Namespace) -> bool:
    """Return whether the clips have names that no one asked for, which are never written over."""
    return args.prompts is None and args.output_dir is None


def check_arguments(args: argparse.Namespace) -> None:
    from lumos.errors import UserError
    from lumos.pipeline.request import MAX_VIDEOS_PER_PROMPT

    if args.engine == "ray" and (args.shard is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UserError("--engine ray makes the shares itself; leave out --shard and the launcher")
    if args.engine != "ray" and args.workers is not None:
        raise UserError("--workers has no effect without --engine ray; leave it out, or share the list with --shard")
    for name, instead in (("output", "--output-dir names the folder for several"), ("preview", "it shows a single clip")):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} has no effect on several clips: {instead}; leave it out")
    check_counts(args, batch_size=(1, MAX_BATCH), num_videos_per_prompt=(1, MAX_VIDEOS_PER_PROMPT), seed=(0, MAX_SEED),
                 workers=(1, MAX_WORKERS))  # fmt: skip
    if args.prompts is not None and len(args.seed or ()) > 1:
        raise UserError(f"--seed {' '.join(map(str, args.seed))} gives {len(args.seed)} seeds for a list; give one, to which each "
                        "row adds its number, or a seed in each row")  # fmt: skip
    shares = args.shard is not None or args.engine == "ray" or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if args.prompts is None and args.seed is None and shares:
        raise UserError("several processes need one --seed to agree on; give it")


def requested_rows(args: argparse.Namespace) -> tuple[list[PromptRow], dict[str, Any], int]:
    """Return (rows, options for rows without their own value, seed to which each row adds its number)."""
    from lumos.pipeline.inputs import check_prompt, whole_seed
    from lumos.pipeline.request import needs_words
    from lumos.prompt_lists.rows import PromptRow, read_rows

    defaults = given_arguments(args)
    for name in ("num_videos_per_prompt", "prompt_frames"):
        defaults |= {name: value} if (value := getattr(args, name)) is not None else {}
    if args.prompts is not None:
        return read_rows(args.prompts), defaults, whole_seed(SEED if args.seed is None else args.seed[0])
    for prompt in args.prompt:
        check_prompt(prompt, needs_words(args.interpolate, args.views))
    defaults["seed"] = args.seed[0] if len(args.seed or ()) == 1 else args.seed
    return [PromptRow(0, 0, {"prompt": args.prompt})], defaults, SEED


def where(args: argparse.Namespace, line: int) -> str:
    return f"{args.prompts} line {line}" if args.prompts is not None else "--prompt"


def check_rows(
    args: argparse.Namespace, pipe: VideoPipeline, model: str, rows: list[PromptRow], defaults: dict[str, Any], seed: int, out: Path
) -> tuple[list[ListedClip], dict[int, str], list[tuple[int, str]]]:
    """Check all rows before a clip is made.

    Returns (clips of the good rows, message for each bad row by its line, notes as (line, text)).
    """
    from lumos.errors import RunError, UserError
    from lumos.files import file_identity
    from lumos.prompt_lists.clips import check_file, clips_of, request_of, with_free_name
    from lumos.prompt_lists.rows import PATHS

    hashes = model_sha256(model, args)
    loaded = {"sha256": hashes, "dtype": str(pipe.model.dtype).removeprefix("torch."), "int8": args.int8}
    clips, problems, notes, lines, folders = [], {}, [], {}, set()
    asked = [getattr(args, key) for key in PATHS] + [r.options.get(key) for r in rows for key in PATHS]
    keep = {file_identity(path) for path in asked if path}
    for row in rows:
        try:
            request = request_of(row, defaults, seed, pipe.temporal_compression)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                resolved = pipe.resolve(request)
                pipe.check_pictures(resolved)
            begins_with = {key: path for key in PATHS if (path := getattr(request, key)) is not None}
            inputs = {**loaded, "sha256": {**hashes, **{key: hashed(path) for key, path in begins_with.items()}}}
            found = clips_of(row, request, resolved, inputs, numbered=args.prompts is not None)
            if not found:
                raise UserError("the row asks for no clip")
            if has_default_names(args):
                found = [with_free_name(out, clip) for clip in found]
            for clip in found:
                check_file(out, clip, keep)
                name = clip.file.casefold()
                above = {str(folder) for folder in PurePosixPath(name).parents}
                if inside := above & lines.keys():
                    raise UserError(f"{clip.file} would lie in {inside.pop()}, which is a clip; give it another output")
                if name in folders:
                    raise UserError(f"{clip.file} is the folder of another clip; give it another output")
                if name in lines:
                    by = f"line {lines[name]}" if args.prompts is not None else f"another --seed {clip.seed}"
                    raise UserError(f"{clip.file} is written by {by} too; give it another seed or output")
                lines[name] = row.line
                folders |= above
        except (ValueError, RunError, OSError) as error:
            problems[row.line] = " ".join(str(error).split())
            continue
        if len(clips) + len(found) > MAX_CLIPS:
            raise UserError(f"the list asks for more than {MAX_CLIPS:,} clips; make several lists of it")
        clips += found
        notes += [(row.line, " ".join(str(warning.message).split())) for warning in said]
    return clips, problems, notes


def make_clips(
    args: argparse.Namespace, pipe: VideoPipeline, model: str, clips: list[ListedClip], shard: tuple[int, int], out: Path,
    notes: list[tuple[int, str]], bars: bool = True,
) -> tuple[int, int]:  # fmt: skip
    """Make the missing clips of this process's share; return the number of clips made and of clips that failed.

    Raises RunError if a clip of the share is neither in the folder nor reported as failed at the end.
    """
    from lumos.errors import NotFinite, OutOfMemory, RunError, UserError, printable
    from lumos.progress import LOGGER, progress_bar
    from lumos.prompt_lists.clips import Recorded, batches_of, make_latents
    from lumos.prompt_lists.results import check_made, render
    from lumos.video.io import write_frames

    def describe(clip: ListedClip) -> dict[str, Any]:
        about = metadata(args, model, clip.prompt, clip.seed)
        begins_with = {key: clip.given.get(key) for key in ("image", "video")}
        begins_with |= {key: clip.given[key] for key in ("last_image",) if key in clip.given}
        run = {**circumstances(args, pipe), "seconds": {"since_loaded": round(time.perf_counter() - started, 2)}}
        said = [text for line, text in notes if line == clip.line]
        return {**about, "output": str(out / clip.file), **begins_with, **run, **clip.inputs, "notes": said}

    def make(batch: list[ListedClip]) -> list[tuple[Tensor, Any]]:
        return make_latents(pipe, batch, on_step)

    def on_step(frame: int, frames: int, step: int, steps: int) -> None:
        bar.set_postfix_str(f"part {frame + 1}/{frames}", refresh=False)
        bar.update(0)

    def save(path: Path, clip: ListedClip, made: tuple[Tensor, Any]) -> None:
        write_frames(path, pipe.decode(*made), clip.form.clip.fps, metadata(args, model, clip.prompt, clip.seed))

    started, made, failed = time.perf_counter(), 0, set()
    batches = batches_of(clips, args.batch_size or BATCH_SIZE)[shard[0] - 1 :: shard[1]]
    mine = [clip.file for batch in batches for clip in batch]
    results = Recorded(out, shard, clips, describe)
    if stale := results.stale(mine):
        said = f"note: {len(stale)} clips in {out}, {stale[0]} first, were made with other inputs and are made again"
        LOGGER.warning(printable(said))
    with progress_bar(total=len(mine), unit="clip", disable=shard[0] > 1 or not bars) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # already printed when the rows were checked
        try:
            while batches:
                batch = batches.pop(0)
                form = batch[0].form
                try:
                    with out_of_memory_as(planned(pipe, form.clip, form.sampling, batch[0].prompt, len(batch))):
                        made += render(results, [batch], make, save)
                except (OutOfMemory, NotFinite, UserError) as error:
                    # One clip may spoil its batch (its picture was removed, or its prompt leads to NaN): make each alone.
                    if not isinstance(error, OutOfMemory) and len(batch) > 1:
                        batches[:0] = [[clip] for clip in batch]
                        continue
                    failed |= {clip.file for clip in batch if not results.has(clip.file)}
                    lines = ", ".join(dict.fromkeys(where(args, clip.line) for clip in batch))
                    LOGGER.error(printable(f"{lines}: {' '.join(str(error).split())}"))
                bar.update(len(batch))
        except KeyboardInterrupt:
            done = sum(results.has(clip.file) for clip in clips)
            raise RunError(f"interrupted; {done} of {len(clips)} clips are in {out}; the same command makes the others") from None
        finally:
            results.tidy([clip.file for clip in clips])
    check_made(results, mine if shard[1] > 1 else [clip.file for clip in clips], failed)
    return made, len(failed)
