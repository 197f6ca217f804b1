"""`info`: show what a model folder is: its generator, size, usual clip, sampling options, and what it was trained on."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumos.cli import add_json
from lumos.errors import as_text, printable

if TYPE_CHECKING:
    from lumos.data.trained_on import TrainedOn

CHECKED_PICTURES = 64
"""Number of pictures of synthetic scenes whose lowest PSNR is stored."""
WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="model folder; default: the shipped one")
    add_json(parser)
    add("--write-trained-on", action="store_true",
        help="write trained_on.json into the folder, from the settings in its training.json; for models of scenes")  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lumos import registry
    from lumos.data.trained_on import read_trained_on, write_trained_on
    from lumos.pipeline.defaults import shipped_model
    from lumos.pipeline.hub import local_folder

    folder = Path(shipped_model()) if args.model is None else local_folder(args.model)
    if args.write_trained_on:
        registry.generator_of(folder)
        write_trained_on(folder, trained_on_scenes(folder))
    found = facts(folder)
    trained_on = read_trained_on(folder)
    print("\n".join(line(name, shown_value(value)) for name, value in found.items() if value is not None))
    print("\n".join(lines_on(trained_on)))
    return {**found, "trained_on": trained_on and trained_on.as_json()}


def facts(folder: Path) -> dict[str, Any]:
    """Return the facts about a model folder, by name. No weights are read. UserError for a folder that holds no model."""
    from lumos import registry
    from lumos.files import read_json

    generator = registry.generator_of(folder)
    _, settings, clip = generator.load("cost", "clip").model_of(folder, None)
    parameters, dtypes = stored_weights(folder)
    record = folder / "training.json"
    made = read_json(record, "a record of training") if record.is_file() else {}
    return {
        "model": str(folder), "generator": generator.name, "what": generator.summary,
        "parameters": parameters, "dtype": ", ".join(dtypes),
        "steps": made.get("steps") if isinstance(made, dict) else None,
        "clip": vars(clip), "sampling": vars(settings),
    }  # fmt: skip


def stored_weights(folder: Path) -> tuple[int, list[str]]:
    """Return the number of parameters of the network in a model folder, and the dtypes in which they are stored.

    NotFound for a folder without weights, as a download that broke off leaves it; UserError for a damaged file.
    """
    from math import prod

    from safetensors import SafetensorError, safe_open

    from lumos.errors import NotFound, UserError, reason_of

    parameters, dtypes, files = 0, set(), sorted(folder.glob("*.safetensors"))
    if not files:
        raise NotFound(f"{folder} has no weights: there is no *.safetensors in it; download or copy the whole folder again")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or no safetensors file ({reason_of(error)}); copy it again") from error
        parameters += sum(prod(tensor.get_shape()) for tensor in tensors)
        dtypes |= {tensor.get_dtype() for tensor in tensors}
    return parameters, sorted(dtypes)


def shown_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {as_text(entry)}" for name, entry in value.items() if entry is not None)
    return f"{value:,}" if isinstance(value, int) else as_text(value)


def line(name: str, text: str) -> str:
    """Return a name with a text beside it, which is wrapped to WIDTH in a column of its own."""
    head = f"{name:14}"
    return "\n".join(textwrap.wrap(printable(text), WIDTH, initial_indent=head, subsequent_indent=" " * len(head))) or head


def lines_on(trained_on: TrainedOn | None) -> list[str]:
    """Return the lines on what a model was trained on: its lists, or the first 200 words if it has no lists."""
    if trained_on is None:
        return [line("trained on", "not known (no trained_on.json in the folder)")]
    whole = "" if trained_on.is_complete else ", of more"
    found = [line("trained on", f"captions with {len(trained_on.words):,} words{whole}")]
    found += [line(f"  {name}", ", ".join(values)) for name, values in trained_on.lists.items()]
    if not trained_on.lists:
        found.append(line("  words", ", ".join(sorted(trained_on.words)[:200])))
    return found


def trained_on_scenes(folder: Path) -> TrainedOn:
    """Return what a model of synthetic scenes was trained on, from the settings in its training.json.

    The lowest PSNR is that of CHECKED_PICTURES pictures that training never had. UserError for a model of other data.
    """
    from dataclasses import replace

    from lumos.data.seeding import VALIDATION_SEED
    from lumos.data.synthetic.sampling import SyntheticScenes
    from lumos.data.synthetic.vocabulary import caption_words, drawn_things
    from lumos.data.trained_on import TrainedOn
    from lumos.errors import UserError
    from lumos.files import read_json
    from lumos.pipeline.base import VideoPipeline
    from lumos.pipeline.notes import lowest_psnr
    from lumos.runtime import no_progress_bar

    file = folder / "training.json"
    try:
        data = read_json(file, "a record of training")["settings"]["data"]
        if data["source"] != "worlds":
            raise UserError(f"{folder} was not trained on synthetic scenes; its training itself writes what it was trained on")
        options = dict(data["options"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} has no settings of data; export the model again from its run") from error
    with no_progress_bar():
        pipe = VideoPipeline.from_pretrained(folder, device="cpu")
    shape = {"height": pipe.clip.height, "width": pipe.clip.width, "num_frames": 1, "seed": VALIDATION_SEED}
    scenes = SyntheticScenes(**options, **shape)
    pictures = [scenes[index][0][0] for index in range(CHECKED_PICTURES)]
    found = TrainedOn.of(sorted(caption_words(scenes)), drawn_things(replace(scenes, num_frames=2)))
    return replace(found, picture_psnr=lowest_psnr(pictures, pipe.reconstruct))
