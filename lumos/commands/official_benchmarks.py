"""Functions that `evaluate vbench`, `vbench-i2v` and `geneval` share: draw the official prompts, sum up official results."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from lumos.cli import add_json
from lumos.commands.counts import MAX_BATCH, MAX_SEED, check_counts
from lumos.commands.loading import add_device, add_parts, ended_by_sigterm, hashed, load, metadata, model_sha256
from lumos.errors import printable
from lumos.evaluation.prompt_lists import BENCHMARKS
from lumos.pipeline.options import add_flags, all_options, given_options

SHAPE = ("num_frames", "height", "width", "fps")
SEED, BATCH_SIZE = 0, 5
MAX_SAMPLES = 10_000


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    benchmark, add = BENCHMARKS[name], parser.add_argument
    add_json(parser)
    add("--prompts", help=f"the official list, {benchmark.list_file}, or a list of the same format")
    if benchmark.images:
        add("--images", help="folder of the pictures in the list, for example vbench2_beta_i2v/data/crop/7-4")
    add("--out", help=f"folder for {benchmark.folder}/ and manifest.json; the same command continues an interrupted run")
    add("--model", help="model folder; default: the shipped one")
    add_parts(parser)
    add("--captions", help="captions for the model in place of the prompts: JSON {prompt: caption}, or a line for each entry")
    add("--caption-key", help="field of the list's entries with the caption for the model in place of the prompt")
    add("--samples", type=int, help="samples of each prompt; default: the number that the benchmark asks for")
    add("--seed", type=int, help=f"the seed of each file follows from this one and the file's name; default: {SEED}")
    add("--batch-size", type=int, help=f"samples in a batch; default: {BATCH_SIZE}")
    add("--shard", metavar="I/N", help="draw only part I of N (I from 1); torchrun sets it for each of its processes")
    if not benchmark.pictures:
        add("--num-frames", type=int, help="1 + a multiple of 4")
        add("--fps", type=int, help="frames per second")
    add("--height", type=int, help="pixels")
    add("--width", type=int, help="pixels")
    add_flags(parser, all_options(), pictures=benchmark.pictures, given=benchmark.images)
    add_device(parser)
    results = "results.jsonl" if benchmark.pictures else "*_eval_results.json, folders or zips of them"
    add("--aggregate", nargs="+", metavar="RESULTS", help=f"only print the totals of official results: {results}")
    add("--output", help="JSON file for the totals of --aggregate")


def run(args: argparse.Namespace, name: str) -> dict[str, Any]:
    from lumos.errors import UserError

    own, shared = {"aggregate", "output"}, {"what", "module", "json", "quiet", "threads", "own_process"}
    given = {key: value for key, value in vars(args).items() if value is not None and key not in shared}
    if args.aggregate:
        if other := [f"--{key.replace('_', '-')}" for key in given if key not in own]:
            raise UserError(f"{', '.join(other)} have no effect with --aggregate, which draws nothing; leave them out")
        return aggregate(args.aggregate, name, args.output)
    if args.output:
        raise UserError("--output has no effect without --aggregate; --out names the folder for what is drawn")
    needed = ["prompts", "out", *(["images"] if BENCHMARKS[name].images else [])]
    if missing := [f"--{key}" for key in needed if key not in given]:
        raise UserError(f"{', '.join(missing)} missing; give --{' and --'.join(needed)}, or --aggregate to sum up results")
    return draw(args, name)


def aggregate(paths: list[str], name: str, output: str | None) -> dict[str, Any]:
    from lumos.evaluation.scores import summarize, table
    from lumos.files import check_writable, write_json

    if output:
        check_writable(output)
    summary = {"evaluate": name, "results": paths, **summarize(name, paths)}
    print(table(summary))
    if output:
        write_json(output, summary)
    return summary


def draw(args: argparse.Namespace, name: str) -> dict[str, Any]:
    from lumos.evaluation.manifest import keep_manifest
    from lumos.evaluation.prompt_lists import read_list
    from lumos.evaluation.rendering import batches_of
    from lumos.files import folder_sha256
    from lumos.prompt_lists.results import Results, check_made, only_shard, parse_shard, render

    benchmark, out, started = BENCHMARKS[name], Path(args.out), time.perf_counter()
    shard = parse_shard(args.shard)
    seed = SEED if args.seed is None else args.seed
    batch_size = BATCH_SIZE if args.batch_size is None else args.batch_size
    check_counts(args, samples=(1, MAX_SAMPLES), seed=(0, MAX_SEED), batch_size=(1, MAX_BATCH))
    entries = read_list(benchmark, args.prompts, samples=args.samples, captions=args.captions, caption_key=args.caption_key)
    batches = batches_of(entries, seed, batch_size)
    samples = [sample for batch in batches for sample in batch]
    notes = [note for entry in entries for note in entry.notes]
    images = check_images(entries, Path(args.images)) if benchmark.images else []

    import numpy as np
    import torch

    from lumos.pipeline.inputs import check_num_frames, override
    from lumos.pipeline.request import check_side
    from lumos.progress import LOGGER, progress_bar
    from lumos.runtime import versions
    from lumos.video.io import write_video

    pipe, model = load(args)
    options = given_options(args, all_options()) | {key: getattr(args, key, None) for key in SHAPE}
    if benchmark.pictures:
        options["num_frames"] = 1
    clip = override(pipe.clip, **{**{key: options[key] for key in SHAPE}, **({"fps": 1} if benchmark.pictures else {})})
    settings = {**vars(pipe.settings.changed(**given_options(args, all_options()))), **vars(clip)}
    check_num_frames(clip.num_frames, pipe.temporal_compression)
    for side in ("height", "width"):
        check_side(getattr(clip, side), side, pipe.size_unit, pipe.largest_side)
    for caption in dict.fromkeys(sample.caption for sample in samples):
        pipe.prompt_tokens(caption, clip)

    inputs = {
        "benchmark": name, "model_sha256": model_sha256(model, args), "prompts_sha256": hashed(args.prompts),
        "captions_sha256": hashed(args.captions), "caption_key": args.caption_key,
        "images_sha256": folder_sha256(Path(args.images), images) if images else None,
        "seed": seed, "batch_size": batch_size, "dtype": str(pipe.model.dtype).removeprefix("torch."), "settings": settings,
        "seeds": {sample.file: sample.seed for sample in samples},
    }  # fmt: skip
    paths = {key: getattr(args, key, None) for key in ("prompts", "captions", "images", "video_tokenizer", "text_tokenizer")}
    machine = {"device": pipe.model.device.type, "threads": torch.get_num_threads(), "versions": versions()}
    environment = {"model": model, **paths, **machine}

    def make(batch: list) -> list[np.ndarray]:
        pictures = [str(Path(args.images) / sample.image) for sample in batch] if benchmark.images else None
        captions, seeds = [s.caption for s in batch], [s.seed for s in batch]
        return pipe(captions, seed=seeds, image=pictures, output_type="uint8", **options).frames

    def save(path: Path, sample: Any, frames: np.ndarray) -> None:
        write_video(path, frames, clip.fps, metadata(args, model, sample.caption, sample.seed))

    mine = batches[shard[0] - 1 :: shard[1]]
    bar_of = {"total": len(mine), "unit": "batch", "desc": f"shard {shard[0]}/{shard[1]}", "disable": shard[0] > 1}
    with ended_by_sigterm(), only_shard(out, shard):
        for change in keep_manifest(out, out / benchmark.folder, inputs, environment):
            LOGGER.warning(printable(f"note: the files already in {out} were made with other inputs: {change}"))
        results = Results(out, benchmark.folder, shard)
        results.check_case([sample.file for sample in samples])
        for file, text in notes if shard[0] == 1 else []:
            if not results.has(file):
                results.put(file, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        with progress_bar(**bar_of) as bar:
            made = render(results, mine, make, save, bar.update)
        check_made(results, [*(s.file for batch in mine for s in batch), *(file for file, _ in notes if shard[0] == 1)])
        missing = results.tidy([*(sample.file for sample in samples), *(file for file, _ in notes)])
    summary = {
        "evaluate": name, "folder": str(results.folder), "shard": "{}/{}".format(*shard), "files": len(samples), "made": made,
        "missing": missing, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    print(printable(f"{results.folder}  {made} files made now  {missing} of {len(samples)} missing  {summary['seconds']} s"))
    return summary


def check_images(entries: list, folder: Path) -> list[Path]:
    """Return the paths of the first frames of all entries. Raises UserError if pictures are missing."""
    from lumos.errors import UserError

    paths = [folder / name for name in dict.fromkeys(entry.image for entry in entries)]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{len(missing)} of {len(paths)} pictures are missing, {missing[0]} first; --images names their folder")
    return paths
