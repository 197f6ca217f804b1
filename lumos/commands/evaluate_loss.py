"""`evaluate loss`: loss and accuracy of masked codes, by latent frame and by the share of codes that are masked."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from lumos.cli import add_json
from lumos.commands.counts import MAX_BATCH, MAX_CLIPS, MAX_SEED, check_counts
from lumos.commands.loading import add_device, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    from lumos import registry
    from lumos.data.synthetic.scene import CAPTIONED_KINDS, SPLITS

    add = parser.add_argument
    add("--model", help="model folder; default: the shipped one")
    add("--data", help="folder of shards that `ingest` wrote; default: synthetic scenes")
    add("--kinds", nargs="+", choices=CAPTIONED_KINDS, help="kinds of objects in the synthetic scenes; default: shapes and digits")
    add("--split", choices=SPLITS, help="split of the synthetic scenes; default: train (but scenes that training does not see)")
    add("--count", type=int, default=100, help="number of clips; default: %(default)s")
    add("--num-frames", type=int, help="frames of a clip, 1 + a multiple of 4; 1: pictures; default: as the model generates")
    registry.load(registry.generator_with("evaluations", "loss").evaluations["loss"].arguments)(parser)
    add("--seed", type=int, default=1_000_000, help="seed of the masks and of the synthetic scenes; training uses other seeds")
    add("--batch-size", type=int, default=20, help="clips in a batch; default: %(default)s")
    add("--output", help="JSON file for the results")
    add_device(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos import registry
    from lumos.data.synthetic.sampling import SyntheticScenes
    from lumos.errors import UserError
    from lumos.files import check_writable, folder_sha256, write_json
    from lumos.pipeline.inputs import check_num_frames, override
    from lumos.progress import progress_bar
    from lumos.runtime import versions

    check_counts(args, count=(1, MAX_CLIPS), bins=(1, 100), batch_size=(1, MAX_BATCH), seed=(0, MAX_SEED))
    chosen = {name: value for name, value in (("kinds", args.kinds), ("split", args.split)) if value}
    if args.data and chosen:
        raise UserError(f"--{' and --'.join(chosen)} have no effect with --data, whose clips are what they are; leave them out")
    if args.output:
        check_writable(args.output)
    started = time.perf_counter()
    pipe, model = load(args)
    loss = registry.generator(pipe.generator).load("evaluations", "loss")
    clip = override(pipe.clip, num_frames=args.num_frames)
    check_num_frames(clip.num_frames, pipe.temporal_compression)
    if args.data:
        data = {"shards": args.data}
        codes = loss.shard_codes(args.data, args.count, clip.num_frames, pipe.video_tokenizer)
    else:
        shape = {name: getattr(clip, name) for name in ("num_frames", "fps", "height", "width")}
        scenes = SyntheticScenes(seed=args.seed, **chosen, **shape)
        data = {"worlds": vars(scenes)}
        codes = loss.scene_codes(scenes, args.count, pipe.video_tokenizer)
    sequences = [loss.sequence_of(pipe, *found) for found in codes]
    total = (args.bins + 1) * -(-len(sequences) // args.batch_size)
    with progress_bar(total=total, unit="batch", leave=False) as bar:
        results = loss.masked_code_loss(
            pipe.model, sequences, kind=args.mask, num_bins=args.bins, seed=args.seed, batch_size=args.batch_size,
            on_batch=bar.update,
        )  # fmt: skip
    print(loss.loss_table(results))
    summary = {
        "evaluate": "loss", "model": model, "model_sha256": folder_sha256(Path(model)), "data": data, "clips": len(sequences),
        "num_frames": clip.num_frames, "mask": args.mask, "seed": args.seed, "results": results,
        "seconds": round(time.perf_counter() - started, 1), "versions": versions(),
    }  # fmt: skip
    if args.output:
        write_json(args.output, summary)
    return summary
