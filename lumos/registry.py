"""The registry of generators: which exist, and where their parts are.

A generator is a package that defines `GENERATOR`. To add one, add its folder and one line in `PACKAGES`.
Listing generators imports none of their parts: `Generator.load` imports a part when it is needed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lumos.errors import NotFound, UserError, instead, shown
from lumos.files import read_json

PACKAGES = ["lumos.models.lumos1", "lumos.models.stiv"]
"""Packages of the generators; the first one is the default."""


class Benchmark(NamedTuple):
    """A target of `python -m lumos bench`.

    summary     one line on what it measures
    module      has `settings_from(args)`, `steps(settings, bench)` and `run(settings, bench)`, see `lumos.benchmarks`
    arguments   "module:function" that adds its flags; it imports no torch
    """

    summary: str
    module: str
    arguments: str


class Evaluation(NamedTuple):
    """A measurement of `python -m lumos evaluate` that only some generators have.

    module      has the functions that its verb calls
    arguments   "module:function" that adds the flags of its own; it imports no torch
    """

    module: str
    arguments: str


@dataclass(frozen=True)
class Generator:
    """A kind of model that makes video, and the places of its parts as "module:Name" strings.

    name         its name in configs and commands
    summary      one line on what it is
    model_types  values of `model_type` in config.json that belong to it
    config       class of the model's configuration, with `presets()`, the names of its shapes, and `from_pretrained(folder)`
    model        class of the network (`from_pretrained`, `save_pretrained`)
    pipeline     a `lumos.pipeline.base.VideoPipeline`
    task         a `lumos.training.task.TrainingTask`
    settings     dataclass of its training settings, a `lumos.training.settings.TrainingSettings`
    sampling     dataclass of its sampling options, a `lumos.pipeline.options.SamplingOptions`
    distillation a `lumos.compression.distillable.Distillable`, for models that learn from a teacher; "": there is none
    cost         modules that count parameters, FLOPs and bytes: "training" and "clip", see `lumos.planning.cost`
    benchmarks   targets of `python -m lumos bench`, by name
    evaluations  measurements of `python -m lumos evaluate` that only some generators have, by name
    verbs        functions of verbs that only some generators have, by the verb's name
    """

    name: str
    summary: str
    model_types: tuple[str, ...]
    config: str
    model: str
    pipeline: str
    task: str
    settings: str
    sampling: str
    cost: dict[str, str]
    distillation: str = ""
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    verbs: dict[str, str] = field(default_factory=dict)

    def load(self, part: str, name: str | None = None) -> Any:
        """Import a part: `load("pipeline")`, or the entry of a part that is a dict: `load("cost", "clip")`."""
        if name is None:
            return load(getattr(self, part))
        places = getattr(self, part)
        if name not in places:
            raise UserError(f"{name} is not possible with models of the generator {self.name}")
        place = places[name]
        return load(place if isinstance(place, str) else place.module)


def load(place: str) -> Any:
    """Import and return the object at "module:Name", or the module if there is no name."""
    module, _, attribute = place.partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def generator_with(part: str, name: str) -> Generator:
    """Return the first generator that has the entry `name` in a part that is a dict, such as "verbs"."""
    return next(candidate for candidate in generators().values() if name in getattr(candidate, part))


def generators() -> dict[str, Generator]:
    """Return all generators by name, the default one first."""
    found = [import_module(package).GENERATOR for package in PACKAGES]
    return {generator.name: generator for generator in found}


def generator(name: str | None = None) -> Generator:
    """Return the generator of this name, or the default one for None. Raises UserError for an unknown name."""
    known = generators()
    if name is None:
        return next(iter(known.values()))
    if not isinstance(name, str) or name not in known:
        raise UserError(f"generator {shown(name)} is unknown{instead(name, known)}")
    return known[name]


def find_preset(text: str) -> tuple[Generator, str]:
    """Return the generator that `text` names a model shape (preset) of, and the name of the shape.

    `text` is GENERATOR-PRESET, such as lumos1-3b, or the name of a preset alone. A name alone means the
    default generator if it has a preset of this name. Raises UserError if no generator has the preset,
    or if several others have it.
    """
    known = generators()
    for name, candidate in known.items():
        if text.startswith(f"{name}-") and (shape := text.removeprefix(f"{name}-")) in candidate.load("config").presets():
            return candidate, shape
    presets = {name: candidate.load("config").presets() for name, candidate in known.items()}
    owners = [name for name, shapes in presets.items() if text in shapes]
    default = next(iter(known))
    if not owners:
        shared = {shape for shape, count in Counter(chain(*presets.values())).items() if count > 1}
        lists = (
            ", ".join(shape if name == default or shape not in shared else f"{name}-{shape}" for shape in shapes) + f" ({name})"
            for name, shapes in presets.items()
        )
        raise UserError(f"unknown preset {shown(text)}; known presets: {', '.join(lists)}")
    if len(owners) > 1 and owners[0] != default:
        allowed = " or ".join(f"{name}-{text}" for name in owners)
        raise UserError(f"preset {shown(text)} is one of several generators; give {allowed}")
    return known[owners[0]], text


def _meant_in(folder: Path) -> str:
    """Return what a user may do who has named a folder without a config.json as a model."""
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter: give it as lora (--lora), and its base model here"
    if (folder / "export" / "config.json").is_file():
        return f"it is a run, whose model is {folder / 'export'}"
    return "give the folder of a saved or released model"


def generator_of(folder: str | Path) -> Generator:
    """Return the generator of a model folder, by `model_type` in its config.json.

    Raises NotFound if there is no such folder or no config.json in it, UserError for an unknown model type.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise NotFound(f"there is no model folder {folder}; give the folder of a saved or released model")
    if not path.exists():
        raise NotFound(f"{folder} is no model folder: it has no config.json; {_meant_in(Path(folder))}")
    config = read_json(path, "the config of a model")
    if not isinstance(config, dict):
        raise UserError(
            f"{path} is damaged ({path} holds {shown(config)}; a model's config is a JSON object of fields); "
            "download or copy it again"
        )
    model_type = config.get("model_type")
    known = generators().values()
    for candidate in known:
        if model_type in candidate.model_types:
            return candidate
    if "model_type" not in config and "spatial_compression" in config:
        raise UserError(
            f"{folder} is a video tokenizer, not a model; give the folder of a model, or measure the tokenizer with "
            f"`lumos evaluate tokenizer --tokenizer {folder}`"
        )
    types = ", ".join(f"{model_type} ({entry.name})" for entry in known for model_type in entry.model_types)
    raise UserError(f"{path} has model_type {shown(model_type)}, which no generator here has; known: {types}")
