"""`demo`: serve a page for the browser and an HTTP API."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lumos import registry
from lumos.commands.loading import PLACES, add_loading, circumstances, ended_by_sigterm, load, metadata
from lumos.errors import UserError
from lumos.files import read_prompts
from lumos.wording import is_blank

if TYPE_CHECKING:
    import numpy as np

    from lumos.demo.keys import Keys
    from lumos.demo.replicas import Replicas

MAX_EXAMPLES_BYTES = 2**20
EXAMPLES = (
    "a large red circle moves left on a gray background",
    "a small blue square moves up",
    "the digit 7 moves up",
    "a large green triangle grows",
    "a rocket moves up on a navy background",
    "an owl stays still on a sunset background",
    "a red plus moves right and a white square stays still",
)
"""Prompts like those that the shipped model was trained on; tests/demo/test_examples.py holds them to what it was trained on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server(parser, port=7860, root="outputs/demo")
    parser.add_argument(
        "--examples", type=Path, help="text file with one prompt a line; default: examples for the shipped model, none for others"
    )


def add_server(parser: argparse.ArgumentParser, port: int, root: str) -> None:
    """Add the flags of a server: model, address, folder and limits. port, root: the defaults."""
    from lumos.demo.limits import Limits

    add = parser.add_argument
    add("--model", help="model folder; default: the shipped one")
    add_loading(parser)
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in; default: this machine only")
    add("--allowed-host", action="append", default=[], metavar="NAME",
        help="another host name of this server, for example that of a proxy; may be given several times. Always allowed are "
             "localhost, --host, and the address that a request comes to")  # fmt: skip
    add("--port", type=int, default=port, help="port to listen on; default: %(default)s")
    add("--root", type=Path, default=Path(root), help="folder of results and uploads; no other folder is served")
    for entry in fields(Limits):
        shown = "" if entry.default is None else f"; default: {entry.default:g}"
        add(f"--{entry.name.replace('_', '-')}", type=float if entry.type == "float" else int, default=entry.default,
            help=f"{entry.metadata['help']}{shown}")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:  # find_spec is fast; importing gradio takes seconds
        raise UserError("demo needs gradio, which is not installed; install it with pip install 'lumos-video[demo]'")
    if args.examples:
        examples = dict.fromkeys(read_examples(args.examples))
    else:
        examples = own_examples() if args.model is None else {}
    start(args, examples)


def own_examples() -> dict[str, np.ndarray]:
    """Return the prompts for the shipped model, each with the clip that it asks for, uint8 [T, H, W, 3]."""
    from lumos.evaluation.drawn_captions import draw_caption

    return {prompt: draw_caption(prompt) for prompt in EXAMPLES}


def start(
    args: argparse.Namespace,
    examples: Mapping[str, np.ndarray | None] | None,
    keys: Keys | None = None,
    replicas: AbstractContextManager[Replicas] | None = None,
) -> None:
    """Load the model and serve until Ctrl-C or SIGTERM.

    examples, keys: those of `lumos.demo.server.build_app`. replicas: makes the replicas that make the clips; the model, which
    then only checks the requests, is loaded on the CPU.
    """
    from lumos.demo.hosts import Hosts
    from lumos.demo.limits import Limits
    from lumos.demo.server import listen, serve
    from lumos.demo.service import Service
    from lumos.files import only_writer
    from lumos.pipeline.hub import local_folder

    if args.model is not None:
        registry.generator_of(local_folder(args.model))  # a wrong folder is refused before anything is written
    limits = Limits(**{entry.name: getattr(args, entry.name) for entry in fields(Limits)})
    hosts = Hosts(args.allowed_host, args.host)
    with (
        ended_by_sigterm(), only_writer(args.root, "server"), listen(args.host, args.port) as listener,
        replicas or nullcontext() as ready,
    ):  # fmt: skip
        pipe, model = load(args if ready is None else argparse.Namespace(**{**vars(args), "device": "cpu"}))
        named = without_folders(args)
        service = Service(
            pipe, args.root, limits, partial(metadata, named, Path(model).name), partial(circumstances, named, pipe), ready
        )
        serve(service, examples, listener, hosts, keys)


def without_folders(args: argparse.Namespace) -> argparse.Namespace:
    """Return the options with folder names in place of paths, because visitors must not see paths of this machine."""
    places = {name: getattr(args, name) for name in PLACES}
    return argparse.Namespace(**{**vars(args), **{name: place and Path(place).name for name, place in places.items()}})


def read_examples(path: Path) -> list[str]:
    """Return the prompts of a text file, without empty lines."""
    text = read_prompts(path, "examples, one prompt a line", MAX_EXAMPLES_BYTES, pipes=True)
    return [line.strip() for line in text.split("\n") if not is_blank(line)]
