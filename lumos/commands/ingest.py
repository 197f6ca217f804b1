"""`ingest`: turn videos and pictures into shards of codes. The same command continues an interrupted ingest."""

from __future__ import annotations

import argparse
from typing import Any

from lumos.cli import add_json
from lumos.errors import printable

MOST_USUAL_WORKERS = 8
"""Worker processes at most if the user gives no number. Each holds a tokenizer and the frames of a clip."""


def usual_workers(device: str | None) -> int:
    """Return how many workers an ingest has if the user gives no number."""
    import torch

    from lumos.runtime import pick_device

    return 1 if pick_device(device).type != "cpu" else min(torch.get_num_threads(), MOST_USUAL_WORKERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE",
        help="folder, csv / jsonl / parquet with path and caption, webdataset tar, or a single file")  # fmt: skip
    add("--captions", help="csv / jsonl / parquet with path and caption, for a source without captions")
    add("--caption", help="the caption of all clips, in place of captions of their own")
    add("--out", required=True, help="folder of shards to write or to continue")
    add("--tokenizer", required=True, help="folder of the video tokenizer, or a model folder")
    add("--fps", type=int, default=12, help="frames per second of the clips; default: %(default)s")
    add("--size", default="256p", help="256p, 384p, 480p (buckets by aspect ratio) or HEIGHTxWIDTH; default: %(default)s")
    add("--frames", type=int, default=25, dest="num_frames", help="frames of a clip, 1 + a multiple of 4; default: %(default)s")
    add("--min-frames", type=int, help="make clips of at least this length from shorter videos; default: skip shorter videos")
    add("--clips-per-video", type=int, default=1, help="maximum number of clips of a video; default: 1, from its middle")
    add("--per-frame-codes", action="store_true",
        help="also store the codes of each frame as a picture, for models with per_frame latents; shards are then about twice "
             "as large or more")  # fmt: skip
    add("--engine", default="local", help="local: processes of this machine; ray: actors on a Ray cluster; default: local")
    add("--workers", type=int, help="processes, each with one thread, or maximum number of actors; 0: no other process; "
        f"default: one for each thread (--threads), at most {MOST_USUAL_WORKERS}, and 1 on a GPU")
    add("--item-timeout", type=float, metavar="SECONDS", help="skip an item that takes longer; default: half an hour")
    add("--max-failure-rate", type=float, default=0.1,
        help="stop if a larger share of the items gives no clip; default: %(default)s")  # fmt: skip
    add("--retry-skipped", action="store_true", help="try the items again that an earlier run skipped")
    add("--shard-clips", type=int, default=1000,
        help="clips in a shard; a kill loses at most one shard of work; default: %(default)s")  # fmt: skip
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos.data.ingest.encode import ClipSettings
    from lumos.data.ingest.ingest import ingest
    from lumos.progress import LOGGER, progress_bar

    names = ("fps", "size", "num_frames", "min_frames", "clips_per_video", "per_frame_codes")
    device = "cpu" if args.engine == "ray" else args.device  # Ray has its own devices, which `ingest` checks
    workers = usual_workers(device) if args.workers is None else args.workers
    settings = ClipSettings(**{name: getattr(args, name) for name in names})
    with progress_bar(unit="item", desc="ingesting") as bar:

        def on_item(done: int, skipped: int) -> None:
            bar.set_postfix(skipped=skipped, refresh=False)
            bar.update()

        report = ingest(
            args.sources, args.out, args.tokenizer, settings, captions=args.captions, caption=args.caption, engine=args.engine,
            workers=workers, item_timeout=args.item_timeout, max_failure_rate=args.max_failure_rate, shard_clips=args.shard_clips,
            retry_skipped=args.retry_skipped, device=args.device, on_item=on_item,
            warn=lambda text: LOGGER.warning(f"warning: {text}"),
        )  # fmt: skip
    keys = ("items", "encoded", "clips", "skipped_items", "reasons", "new_items", "seconds")
    made = f"{report['clips']} clips  {report['skipped_items']} of {report['items']} items skipped  {report['seconds']} s"
    print(printable(f"{args.out}  {made}"))
    return {"out": args.out, **{key: report[key] for key in keys}}
