"""`generate --engine ray`: the shares of a list of clips as tasks of a Ray cluster.

Each task does what a process with --shard I/N does, and writes its clips into the same folder, which
every node must reach under the same path. A task whose node dies is started anew and makes what is
missing, so the clips are those of a single process.
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import asdict
from types import ModuleType
from typing import Any

from lumos.cli import messages
from lumos.commands.generate_list import Share, make_share
from lumos.data.ingest.ray_executor import connect_to_ray, cores_of_each, gpus_of_each
from lumos.errors import RunError, UserError, reason_of
from lumos.progress import LOGGER, progress_bar
from lumos.threads import threads_of_a_call

ATTEMPTS = 3  # how often Ray starts a task anew whose process or node has died
DEVICES = (None, "auto", "cpu", "cuda")


def make_on_ray(args: argparse.Namespace) -> Share:
    """Make all clips in tasks and return the sum of their shares.

    UserError if Ray is not installed or has no GPU that is asked for, and for rows that cannot be
    made; RunError if a task fails.
    """
    ray = import_ray()
    if args.device not in DEVICES:
        allowed = "which assigns the GPUs; allowed: auto, cpu, cuda"
        raise UserError(f"device '{args.device}' is not allowed with --engine ray, {allowed}")
    own = connect_to_ray(ray)
    try:
        on_gpu = gpus_of_each(ray, args.device)
        workers = args.workers or (int(ray.cluster_resources()["GPU"]) if on_gpu else 1)
        threads = cores_of_each(ray, args.threads)
        task = ray.remote(num_cpus=threads, num_gpus=on_gpu, max_retries=ATTEMPTS)(share_in_task)
        values = {**vars(args), "threads": threads}
        waiting = [task.remote(values, number, workers, os.getcwd()) for number in range(1, workers + 1)]
        shares, said = [], set()
        with progress_bar(total=workers, unit="share") as bar:
            while waiting:
                (done,), waiting = ray.wait(waiting)
                answer = ray.get(done)
                for level, line in answer["said"]:
                    if line not in said:  # every share says what is wrong with the rows
                        said.add(line)
                        LOGGER.log(level, line)
                if "error" in answer:
                    raise (UserError if answer["is_users"] else RunError)(answer["error"])
                shares.append(Share(**answer["share"]))
                bar.update(1)
    except ray.exceptions.RayError as error:
        raise RunError(f"a Ray task failed ({reason_of(error)}); run the same command again: it makes what is missing") from error
    except KeyboardInterrupt:
        raise RunError("interrupted; the same command makes what is missing") from None
    finally:
        if own:
            ray.shutdown()
    made, failed = (sum(getattr(share, name) for share in shares) for name in ("made", "failed"))
    return Share(made, failed, shares[0].clips, shares[0].rows, shares[0].bad_rows)


def share_in_task(values: dict[str, Any], number: int, workers: int, folder: str) -> dict[str, Any]:
    """Make one share and return it with its messages. Plain values only, which every version of Ray can send."""
    os.chdir(folder)
    args = argparse.Namespace(**{**values, "engine": None, "workers": None, "shard": f"{number}/{workers}"})
    said = Said()
    answer: dict[str, Any] = {"said": said.messages}
    with messages(values.get("quiet", False), said), threads_of_a_call(values["threads"]):
        try:
            answer["share"] = asdict(make_share(args, bars=False))
        except (UserError, RunError) as error:
            answer |= {"error": str(error), "is_users": isinstance(error, UserError)}
    return answer


class Said(logging.Handler):
    """A handler that keeps the messages, each as (level, text)."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append((record.levelno, self.format(record)))


def import_ray() -> ModuleType:
    """Import ray; UserError if it is not installed."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError(f"--engine ray needs Ray ({error}); pip install 'lumos-video[ray]', or leave --engine out") from error
    return ray
