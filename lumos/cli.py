"""The command line: `python -m lumos VERB ...`.

The exit code is 0 for success, 1 if a correct request failed and 2 for a request that cannot be met.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from lumos import threads
from lumos.errors import RunError, UserError, cut, is_out_of_memory, meant, printable, shown
from lumos.progress import LOGGER, BesideBars
from lumos.shipped import find_shipped_models
from lumos.version import __version__

VERBS = {
    "generate": "make a clip or a picture from a prompt, a picture or a clip",
    "info": "show what a model folder is, and what it was trained on",
    "demo": "open a page in the browser, and an HTTP API, that make clips",
    "serve": "serve the HTTP API without the page, for programs",
    "render": "write clips of synthetic scenes as mp4 with captions, to try ingest and training",
    "ingest": "turn videos and pictures with captions into shards of codes to train on",
    "inspect": "show what a folder of shards holds",
    "plan": "estimate what a training run or a clip will need: steps, FLOPs, memory, time",
    "train": "train a generator",
    "finetune": "train a model on a folder of clips, in one command",
    "export": "write a checkpoint as a model folder, or merge an adapter into one",
    "resize": "make a model that decodes the same codes to clips of another size",
    "convert": "make one model folder of released Lumos-1 weights and their tokenizers",
    "compress": "make a model smaller and faster, and measure what that costs",
    "train-tokenizer": "train a video tokenizer",
    "train-text-tokenizer": "train a text tokenizer from captions",
    "plot": "draw the curves of runs from their logs",
    "evaluate": "measure a model or a tokenizer",
    "experiment": "compare settings: train and evaluate variants, draw the result",
    "bench": "measure speed and memory on this machine",
}

LIGHT_VERBS = ("render", "inspect", "plan", "train-text-tokenizer", "plot")
"""Verbs without `--threads`: they do not compute with torch, or too little for the number of threads to matter."""
MODEL_OPTIONS = ("model", "models", "mix", "tokenizer", "video_tokenizer", "text_tokenizer", "teacher")
"""Options that name models to read. Paths of shipped ones lead to them from any working folder, see `lumos.shipped`."""
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=")
"""The begin of an override, section.key=value."""
SETTING = re.compile(f"--(?={OVERRIDE.pattern})")
"""The dashes before an override that is written like an option."""
CLOSE, VERY_CLOSE = 0.6, 0.8
"""How similar an unknown option is to a known one that was meant; very similar where it may be the key of an override."""
CLOSED_PIPE = 141
"""The exit code when the reader of the output has closed the pipe: 128 + SIGPIPE, as a shell reports it."""


def program(argv: list[str] | None = None) -> int:
    """Do the same as `main` in a process of its own, whose threads are set up before torch is imported; see `lumos.threads`."""
    open_streams()
    return main(argv, own_process="torch" not in sys.modules)


def main(argv: list[str] | None = None, *, own_process: bool = False) -> int:
    """Run one verb and return the exit code. A user's mistake gives one line on stderr, never a traceback.

    own_process: the environment of this process may be changed for the verb.
    """
    code = 0
    try:
        code = run_verb(sys.argv[1:] if argv is None else argv, own_process)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest of its buffer when it ends
        if isinstance(error, BrokenPipeError):  # the reader has closed the pipe, as in `lumos --help | head -1`
            return CLOSED_PIPE
        return code or fail(f"the output cannot be written ({error.strerror}); make room, or write it elsewhere", 1)
    return code


def open_streams() -> None:
    """Give stdout and stderr a place if the caller has closed them, and let them escape characters that their encoding lacks."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run_verb(argv: list[str], own_process: bool = False) -> int:
    """Run the verb `argv[0]` with its options and return the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        verbs = "\n".join(f"  {name:22}{text}" for name, text in VERBS.items())
        print(f"usage: python -m lumos VERB [options]\n\n{verbs}\n\n`python -m lumos VERB --help` lists a verb's options")
        return 0 if argv else 2
    verb = argv[0]
    if verb == "--version":
        print(f"lumos {__version__}")
        return 0
    if verb not in VERBS:
        near = meant(verb, [*VERBS, "--version", "--help"])
        print(f"error: unknown verb {shown(verb)}{near}; known verbs: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        command = importlib.import_module(f"lumos.commands.{verb.replace('-', '_')}")
        kind = Parser if verb in LIGHT_VERBS else ComputingParser
        parser = kind(prog=f"lumos {verb}", description=VERBS[verb])
        command.add_arguments(parser)
        args = parser.parse_all(argv[1:])
        models = {name: value for name in MODEL_OPTIONS if (value := getattr(args, name, None))}
        find_shipped_models(models)
        vars(args).update(models)
        only_json, quiet = getattr(args, "json", False), getattr(args, "quiet", False)
        with (
            messages(quiet),
            text_beside_json(quiet) if only_json else nullcontext(),
            using_threads(args, own_process, watch=verb != "bench"),
        ):
            result = command.run(args)
        if only_json and result is not None:
            print(json.dumps(result))
    except BrokenPipeError:
        raise
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except (UserError, ValueError) as error:
        return fail(error, 2)
    except (RunError, OSError, MemoryError) as error:
        return fail(error, 1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return fail(f"out of memory ({str(error).splitlines()[0]}); make it smaller: size, frames, batch, or a smaller dtype", 1)
    except KeyboardInterrupt:
        return fail("interrupted", 1)
    return 0


@contextmanager
def using_threads(args: argparse.Namespace, own_process: bool, watch: bool) -> Iterator[None]:
    """Within the block, torch uses `args.threads` threads; in a process of its own, the default is the number of free cores.

    watch: print a note if the threads of a process of its own wait long for a core.
    """
    args.threads, args.own_process = getattr(args, "threads", None), own_process
    if not own_process:
        with threads.threads_of_a_call(args.threads):
            yield
        return
    threads.prepare_process(args.threads)
    with threads.watched() if watch else nullcontext():
        yield


@contextmanager
def text_beside_json(quiet: bool) -> Iterator[None]:
    """Print the text of a verb on stderr during the block, so that stdout has JSON alone; nowhere if `quiet`."""
    with open(os.devnull, "w") if quiet else nullcontext(sys.stderr) as file, redirect_stdout(file):
        yield


@contextmanager
def messages(quiet: bool, handler: logging.Handler | None = None) -> Iterator[None]:
    """Print the messages of the logger "lumos" on stderr during the block, errors only if `quiet`, and warnings as notes.

    handler: takes the messages instead of stderr.
    """
    handler, level = handler or BesideBars(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.ERROR if quiet else logging.INFO)
    try:
        with warnings_as_notes():
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print warnings of this package as one line on stderr, like errors. Warnings of libraries are printed as usual."""
    usual, here = warnings.showwarning, Path(__file__).parent

    def show(message: Warning | str, category: type[Warning], filename: str, *where: Any) -> None:
        if category is UserWarning and Path(filename).is_relative_to(here):
            LOGGER.warning(f"note: {one_line(str(message))}")
        else:
            usual(message, category, filename, *where)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong option in one line, without the usage. Every verb has --quiet."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="print no notes and no progress")

    def parse_all(self, argv: list[str]) -> argparse.Namespace:
        """Return the arguments. Overrides (section.key=value) may stand anywhere among the options."""
        if not self.has_overrides:
            return self.parse_args(argv)
        return self.parse_intermixed_args([SETTING.sub("", word) for word in argv])

    @property
    def has_overrides(self) -> bool:
        return any(action.dest == "overrides" for action in self._actions)

    @property
    def has_plain_keys(self) -> bool:
        """Whether an override may have a key without a section, which looks like an option if it begins with dashes."""
        return any(action.dest == "overrides" and action.metavar == "key=value" for action in self._actions)

    def error(self, message: str) -> NoReturn:
        if self.has_overrides and (key := re.search(r"unrecognized arguments: --(\w+(\.\w+)+)", message)):
            message += f", did you mean {key[1]}=VALUE?"
        elif unknown := re.search(r"unrecognized arguments: --([\w-]+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = meant(f"--{unknown[1]}", flags, VERY_CLOSE if self.has_plain_keys else CLOSE)
            message += near or (f", did you mean {unknown[1].replace('-', '_')}=VALUE?" if self.has_plain_keys else "")
        if wrong := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += meant(wrong[1], [choice.strip("'") for choice in wrong[2].split(", ")])
        self.exit(2, f"error: {one_line(message)}; `{self.prog} --help` lists the options\n")


class ComputingParser(Parser):
    """The parser of a verb that computes. It has `--threads`, and so have the parsers of the verb's parts."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.add_argument(
            "--threads", type=int, metavar="N", default=argparse.SUPPRESS,  # a part's default would hide what is before it
            help="CPU threads; default: LUMOS_THREADS or OMP_NUM_THREADS, else as many as there are free cores",
        )  # fmt: skip


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json to a verb whose `run` returns its result. Stdout is then the result as one line of JSON, or nothing if it is None.

    The text goes to stderr, and with --quiet nowhere.
    """
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as one line of JSON")


def fail(error: object, code: int) -> int:
    """Print an error as one line and return the exit code `code`."""
    print(f"error: {one_line(str(error)) or type(error).__name__}", file=sys.stderr)
    return code


def one_line(text: str) -> str:
    """Return a message as one printable line.

    Long values in it are cut, because other libraries print them whole.
    """
    values = r"'[^']*'|(?<=unrecognized arguments: ).*|\S+"
    return printable(re.sub(values, lambda value: cut(value[0]), " ".join(text.split())))
