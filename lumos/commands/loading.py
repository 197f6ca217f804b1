"""Functions of the verbs that make clips: flags for loading a pipeline, loading, records, hashes, out-of-memory messages."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumos.errors import OutOfMemory, RunError, is_out_of_memory
from lumos.pipeline.options import ACCELERATION, add_acceleration, all_options, given_options

if TYPE_CHECKING:
    from lumos.pipeline.base import VideoPipeline
    from lumos.pipeline.defaults import ClipDefaults
    from lumos.pipeline.options import SamplingOptions

PLACES = ("video_tokenizer", "text_tokenizer", "lora")
LOADING = (*PLACES, "device", *ACCELERATION, "device_map")
"""Arguments of a pipeline's from_pretrained whose values are those of the flags."""
LOADING_NEEDS_LESS = "--dtype bfloat16 and --int8 need less, and --device-map auto leaves layers in host memory or in their files"
HALF_NEEDS_LESS = "--dtype bfloat16 needs less"


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the places of the tokenizers."""
    add = parser.add_argument
    add("--video-tokenizer", help="folder of the video tokenizer; default: the one in the model folder")
    add("--text-tokenizer", help="file or folder of the text tokenizer; default: the one in the model folder")


def add_device(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on CUDA, float32 on CPU")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add all flags that say how a pipeline is loaded, except --model."""
    add = parser.add_argument
    add("--lora", help="adapter folder that a run with lora.rank exported; it is merged into the model")
    add_parts(parser)
    add_device(parser)
    add_acceleration(parser)
    add("--device-map", choices=("auto",), help="leave layers that do not fit on the device in host memory or in their files")
    add("--max-memory", nargs="+", metavar="PLACE=SIZE",
        help="memory limits for the weights with --device-map, for example 0=6GiB cpu=16GiB")  # fmt: skip


def given_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a clip that the user gave, by their names in the call of a pipeline."""
    from lumos.pipeline.request import ARGUMENTS

    own = {name: value for name in ARGUMENTS if name != "seed" and (value := getattr(args, name, None)) is not None}
    return own | given_options(args, all_options())


def load(args: argparse.Namespace) -> tuple[VideoPipeline, str]:
    """Load the pipeline for the options of a verb; return it and its model folder. A verb may lack some of the options."""
    import torch
    from transformers.utils import logging

    from lumos.pipeline.base import VideoPipeline
    from lumos.pipeline.defaults import shipped_model
    from lumos.pipeline.hub import local_folder
    from lumos.pipeline.placement import parse_max_memory

    logging.disable_progress_bar()
    model = str(shipped_model() if args.model is None else local_folder(args.model))
    if getattr(args, "lora", None) is not None:
        args.lora = str(local_folder(args.lora))  # lists hash its files
    options = {name: getattr(args, name) for name in LOADING if hasattr(args, name)}
    dtype, limits = args.dtype and getattr(torch, args.dtype), parse_max_memory(getattr(args, "max_memory", None))
    with out_of_memory_as(lambda: LOADING_NEEDS_LESS if "device_map" in options else HALF_NEEDS_LESS):
        return VideoPipeline.from_pretrained(model, dtype=dtype, max_memory=limits, **options), model


def metadata(args: argparse.Namespace, model: str, prompt: str, seed: int) -> dict[str, Any]:
    """Return the metadata to write into the file of a clip."""
    from lumos.version import __version__

    return {"prompt": prompt, "seed": seed, "model": model, "lora": getattr(args, "lora", None), "lumos": __version__}


def circumstances(args: argparse.Namespace, pipe: VideoPipeline) -> dict[str, Any]:
    """Return the part of a clip's JSON record that says where and how it was made: dtype, device, versions, memory."""
    import torch

    from lumos.runtime import peak_memory_bytes, versions

    return {
        "video_tokenizer": args.video_tokenizer, "text_tokenizer": args.text_tokenizer,
        "dtype": str(pipe.model.dtype).removeprefix("torch."), "device": str(pipe.model.device),
        "threads": torch.get_num_threads(),
        "int8": args.int8, "compile": args.compile, "device_map": args.device_map, "max_memory": args.max_memory,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "peak_memory_mb": round(peak_memory_bytes(pipe.model.device) / 2**20), "versions": versions(),
    }  # fmt: skip


@contextmanager
def collected_notes() -> Iterator[list[str]]:
    """Yield a list that gets the text of each warning of the block, which is shown as usual too."""
    notes: list[str] = []
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if category is UserWarning:
            notes.append(" ".join(str(message).split()))
        usual(message, category, *where)

    warnings.showwarning = show
    try:
        yield notes
    finally:
        warnings.showwarning = usual


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM raise SystemExit in the block, so that temporary files are removed as after Ctrl-C.

    The exit code is 128 + SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def hashed(path: str | None) -> str | None:
    """Return the SHA-256 of a file, or of the files in a folder that a model consists of; None for None."""
    from lumos.files import file_sha256, folder_sha256

    if path is None:
        return None
    return folder_sha256(Path(path)) if Path(path).is_dir() else file_sha256(Path(path))


def model_sha256(model: str, args: argparse.Namespace) -> dict[str, str]:
    """Return the SHA-256 of the model folder, and of each tokenizer or adapter that an option names, by name."""
    elsewhere = {name: getattr(args, name, None) for name in PLACES}
    places = {"model": model, **elsewhere}
    return {key: hashed(path) for key, path in places.items() if path}


@contextmanager
def out_of_memory_as(advice: Callable[[], str]) -> Iterator[None]:
    """Turn errors of the block that mean a lack of memory into OutOfMemory; its message ends with `advice()`."""
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
    """Return a function that returns the generator's advice on what needs less memory, for a batch of `clips` clips."""

    def advice() -> str:
        from lumos import registry

        cost = registry.generator(pipe.generator).load("cost", "clip")
        return cost.out_of_memory_advice(pipe.model.config, clip, sampling, pipe.prompt_tokens(prompt, clip), pipe.dtype, clips)

    return advice
