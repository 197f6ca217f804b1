"""What the verbs that make clips share: options, the pipeline, records, hashes, and words for a lack of memory."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumos.commands.options import LOADING, PLACES, given_sampling
from lumos.errors import OutOfMemory, RunError, is_out_of_memory

if TYPE_CHECKING:
    from lumos.pipeline.base import VideoPipeline
    from lumos.pipeline.defaults import ClipDefaults
    from lumos.pipeline.options import SamplingOptions

LOADING_NEEDS_LESS = "--dtype bfloat16 and --int8 need less, and --device-map auto leaves layers in host memory or in their files"
HALF_NEEDS_LESS = "--dtype bfloat16 needs less"


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a clip that were given, by their names in a pipeline's call."""
    from lumos.pipeline.request import ARGUMENTS

    own = {name: value for name in ARGUMENTS if name != "seed" and (value := getattr(args, name, None)) is not None}
    return own | given_sampling(args)


def load(args: argparse.Namespace) -> tuple[VideoPipeline, str]:
    """The pipeline that the verb's options name, as many of them as it has, and its folder."""
    import torch
    import transformers

    from lumos.pipeline.base import VideoPipeline
    from lumos.pipeline.defaults import shipped_model
    from lumos.pipeline.placement import parse_max_memory

    transformers.utils.logging.disable_progress_bar()
    model = str(shipped_model() if args.model is None else args.model)
    options = {name: getattr(args, name) for name in LOADING if hasattr(args, name)}
    dtype, limits = args.dtype and getattr(torch, args.dtype), parse_max_memory(getattr(args, "max_memory", None))
    with out_of_memory_as(lambda: LOADING_NEEDS_LESS if "device_map" in options else HALF_NEEDS_LESS):
        return VideoPipeline.from_pretrained(model, dtype=dtype, max_memory=limits, **options), model


def metadata(args: argparse.Namespace, model: str, prompt: str, seed: int) -> dict[str, Any]:
    """What is written into a clip's file."""
    from lumos.version import __version__

    return {"prompt": prompt, "seed": seed, "model": model, "lora": getattr(args, "lora", None), "lumos": __version__}


def circumstances(args: argparse.Namespace, pipe: VideoPipeline) -> dict[str, Any]:
    """What a record tells of where and how a clip was made."""
    from lumos.runtime import peak_memory_bytes, versions

    return {
        "video_tokenizer": args.video_tokenizer, "text_tokenizer": args.text_tokenizer,
        "dtype": str(pipe.model.dtype).removeprefix("torch."), "device": str(pipe.model.device),
        "int8": args.int8, "compile": args.compile, "device_map": args.device_map, "max_memory": args.max_memory,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "peak_memory_mb": round(peak_memory_bytes(pipe.model.device) / 2**20), "versions": versions(),
    }  # fmt: skip


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the process as Ctrl-C does, with its own exit code: what is half written goes away."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say what signals do
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def hashed(path: str | None) -> str | None:
    """SHA-256 of a file, or of what a folder holds to be read from."""
    from lumos.files import file_sha256, folder_sha256

    if path is None:
        return None
    return folder_sha256(Path(path)) if Path(path).is_dir() else file_sha256(Path(path))


def model_sha256(model: str, args: argparse.Namespace) -> dict[str, str]:
    """Of the model folder, and of each tokenizer and adapter that is taken from elsewhere."""
    elsewhere = {name: getattr(args, name, None) for name in PLACES}
    places = {"model": model, **elsewhere}
    return {key: hashed(path) for key, path in places.items() if path}


@contextmanager
def out_of_memory_as(advice: Callable[[], str]) -> Iterator[None]:
    """Where memory runs out: OutOfMemory, which ends with advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RunError) or not is_out_of_memory(error):
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise OutOfMemory(f"out of memory ({said[0]}); {advice()}") from error


def planned(
    pipe: VideoPipeline, clip: ClipDefaults, sampling: SamplingOptions, prompt: str, clips: int = 1
) -> Callable[[], str]:
    """The advice of the planning code for so many clips at a time, when it is asked for."""

    def advice() -> str:
        from lumos import registry

        cost = registry.generator(pipe.generator).load("cost", "clip")
        return cost.out_of_memory_advice(pipe.model.config, clip, sampling, pipe.prompt_tokens(prompt, clip), pipe.dtype, clips)

    return advice
