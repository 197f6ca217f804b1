"""`serve`: serve the HTTP API without the page, for programs."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumos.commands.counts import MAX_BATCH, check_counts
from lumos.commands.demo import add_server, start, without_folders
from lumos.commands.loading import LOADING, circumstances, load
from lumos.errors import UserError, shown
from lumos.threads import given_count

if TYPE_CHECKING:
    from lumos.demo.replicas import Replicas
    from lumos.pipeline.base import VideoPipeline

MAX_REPLICAS = 10_000
OF_REPLICAS = ("batch_size", "batch_wait", "autoscaling")
"""Options without effect without --replicas."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server(parser, port=8000, root="outputs/serve")
    add = parser.add_argument
    add("--api-keys", type=Path, metavar="FILE",
        help="YAML file with one client a line, NAME: KEY, or NAME: {key: KEY, queue_length: 4, clips_per_hour: 100}; requests "
             "then need the header Authorization: Bearer KEY. Default: no key is needed")  # fmt: skip
    add("--replicas", type=int, metavar="N",
        help="make the clips in N replicas on a Ray cluster (Ray Serve), each with one GPU if it has GPUs; RAY_ADDRESS names the "
             "cluster, by default this machine. Default: make them in this process, one at a time")  # fmt: skip
    add("--batch-size", type=int, help="with --replicas: most clips of one shape that a replica makes at a time; default: 4")
    add("--batch-wait", type=float, metavar="SECONDS",
        help="with --replicas: how long a replica waits for more clips before it begins a batch; default: 0.05")  # fmt: skip
    add("--autoscaling", nargs="+", metavar="NAME=NUMBER",
        help="with --replicas, which then is the most of them: fields of Ray Serve's AutoscalingConfig, for example min_replicas=1 "
             "target_ongoing_requests=4")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("fastapi") is None:
        raise UserError("serve needs fastapi, which is not installed; install it with pip install 'lumos-video[serve]'")
    from lumos.demo.keys import read_keys

    check_counts(args, replicas=(1, MAX_REPLICAS), batch_size=(1, MAX_BATCH))
    start(args, None, None if args.api_keys is None else read_keys(args.api_keys), replicas_of(args))


def replicas_of(args: argparse.Namespace) -> AbstractContextManager[Replicas] | None:
    """Return what makes the replicas that the options ask for, or None; UserError for options without effect."""
    chosen = {name: value for name in OF_REPLICAS if (value := getattr(args, name)) is not None}
    if args.replicas is None:
        if chosen:
            raise UserError(f"--{next(iter(chosen)).replace('_', '-')} has no effect without --replicas; leave it out")
        return None
    from lumos.demo.replicas import ReplicaSettings, import_serve, replicas

    import_serve()
    if args.autoscaling is not None:
        chosen["autoscaling"] = numbers(args.autoscaling)
    options = {name: getattr(args, name) for name in (*LOADING, "model", "dtype", "max_memory")}
    threads = given_count(args.threads) or 1
    return replicas(partial(load_replica, options), ReplicaSettings(args.replicas, device=args.device, threads=threads, **chosen))


def numbers(words: list[str]) -> dict[str, float]:
    """Return the fields NAME=NUMBER by name; UserError for words of another form."""
    found: dict[str, float] = {}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            equals = ""
        if not name or not equals:
            raise UserError(f"--autoscaling {shown(word)} is not allowed; give NAME=NUMBER, for example min_replicas=1")
        if found[name].is_integer():
            found[name] = int(found[name])
    return found


def load_replica(options: dict[str, Any]) -> tuple[VideoPipeline, Callable[[], dict[str, Any]]]:
    """Load the pipeline of a replica, and return it with what says in a record where a clip was made."""
    args = argparse.Namespace(**options)
    pipe, _ = load(args)
    return pipe, partial(circumstances, without_folders(args), pipe)
