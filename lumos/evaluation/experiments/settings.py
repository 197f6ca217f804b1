"""The settings of an experiment: `load` reads its YAML file and checks it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumos.errors import UserError, as_text, shown
from lumos.evaluation.prompts import KINDS
from lumos.settings import build, is_number, read_yaml, setting
from lumos.training.sections import MAX_TRAINING_SEED

OVER = ("step", "flops")
LONGEST_NAME = 200
FIGURES = ("all", "colour", "shape", "motion", "last_frame", "steady", "moved")
MORE_FIGURES = (
    "background", "clip_gflops", "clip_seconds", "colour_and_motion", "count", "first_frame", "frechet", "given_frames",
    "memory_mb", "moving", "psnr", "size", "sprite",
)  # fmt: skip
CLAIM_SEEDS = (3, 10)
"""The least and the largest number of seeds from which a verdict on a claim follows."""
OWN_FILES = ("prune", "pruned", "train", "distill", "evaluate", "prompts")
"""Names in the folder of a run that a training of `before` cannot have."""
OWN_OPTIONS = ("--seed", "--output")
"""Options of `evaluate prompts` that an experiment sets itself for each run."""
OWN_OF_PRUNE = ("--model", "--out", "--seed", "--dry-run")
"""Options of `compress prune` that an experiment sets itself for each run."""


@dataclass
class Training:
    config: str | None = setting(None, "config of `train` or `compress distill` for all variants; null: nothing is trained")
    overrides: list[str] = setting([], "section.key=value for all variants")


@dataclass
class Compression:
    model: str | None = setting(None, "model that `compress prune` makes smaller, and that teaches; null: nothing is pruned")
    prune: list[str] = setting([], "options of `compress prune` for all variants")


@dataclass
class Claim:
    text: str = setting("", "the claim, in a sentence")
    paper: str = setting("", "what the paper reports, with its figures")
    figure: str = setting("", "entry of figures or curves that decides; of losses and frechet, less is better")
    better: str | list[str] = setting("", "variant that is better, as the paper claims; a list: the mean of several")
    than: str | list[str] = setting("", "variant that it is compared with, or a list")
    margin: float = setting(0.0, "by how much it is better at least; negative: by how much it may be worse", low=None)
    floor: dict[str, Any] = setting(
        {}, "{figure: value of chance}: too early to tell below; the claim's own figure in both variants, another one in either"
    )


@dataclass
class Grid:
    rows: str = setting("", "title of the rows of each heat map, in words")
    columns: str = setting("", "title of its columns")
    panels: str = setting("", "title of the third value, which has a heat map of its own; empty: there is none")


@dataclass
class Variant:
    prune: list[str] = setting([], "options of `compress prune` for this variant")
    train: list[str] = setting([], "section.key=value for this variant")
    prompts: list[str] = setting([], "options of `evaluate prompts` for this variant")
    config: str | None = setting(None, "config of `train` for this variant; null: train.config")
    before: dict[str, Any] = setting(
        {}, "trainings before, name: [section.key=value, ...], with the config of the variant; {name} in later ones is the model"
    )
    of: str | None = setting(None, "variant whose trained model is evaluated with other options; nothing is trained here")
    x: float | None = setting(None, "position of the variant on the x axis; null: variants have names only")
    at: list[Any] = setting([], "[row, column, panel] of the variant in the grid; without a panel it is shown in all")


@dataclass
class Experiment:
    question: str = setting("", "the question that the experiment answers")
    train: Training = setting(Training, "the training that all variants share")
    compress: Compression = setting(Compression, "the model that is pruned; train.config is then one of `compress distill`")
    model: str | None = setting(None, "model folder to evaluate if nothing is trained; null: the model of the repository")
    prompts: list[str] | None = setting(None, "options of `evaluate prompts` for all variants; null: it does not run")
    curves: list[str] = setting([], "fields of log.jsonl to compare, for example val_loss_video; of a list: val_time_loss_video[0]")
    names: dict[str, str] = setting({}, "words for curves and figures in the picture, {name: words}")
    minutes: float | None = setting(None, "expected minutes of all runs on two CPU cores, for the reader")
    over: str = setting("step", "x axis of the curves: step, or flops (training FLOPs up to the step)")
    figures: list[str] = setting([*FIGURES], "shares of `evaluate prompts` to draw: means over kinds, or of one kind: all of two")
    axis: str = setting("", "label of the x axis for variants with an x")
    seconds: bool = setting(True, "draw the seconds per clip over x, if the variants have an x")
    grid: Grid | None = setting(None, "draws heat maps: the titles of the values in the variants' `at`")
    claims: list[Claim] = setting([], "claims of a paper, each with the two variants and the figure that decide")
    seeds: list[int] = setting([0], "seeds; each variant runs once with each seed", high=MAX_TRAINING_SEED)
    variants: dict[str, Any] = setting({}, "name: {train: [...], prompts: [...], x: ...}")


def load(path: str | Path) -> Experiment:
    """Return the experiment of a YAML file; UserError for settings that are unknown, wrong or without effect."""
    experiment = build(Experiment, read_yaml(path, [], ("experiments",)))
    if not experiment.variants:
        raise UserError(f"{path} has no variants; name at least one")
    experiment.variants = {str(name): build(Variant, raw, f"variants.{as_text(name)}") for name, raw in experiment.variants.items()}
    trains, judges = experiment.train.config is not None, experiment.prompts is not None
    if not trains and not judges:
        raise UserError(f"{path} neither trains (train.config) nor evaluates (prompts); set one of them")
    for name, variant in experiment.variants.items():
        if variant.train and not trains:
            raise UserError(f"variants.{as_text(name)}.train has no effect without train.config; leave it out")
        if variant.prompts and not judges:
            raise UserError(f"variants.{as_text(name)}.prompts has no effect without prompts; leave it out")
        if not name or "/" in name or "\0" in name or name.startswith(".") or len(name.encode()) > LONGEST_NAME:
            raise UserError(
                f"variant {shown(name)} cannot name a folder; give it a name without / that does not begin with a dot, of at most "
                f"{LONGEST_NAME} bytes"
            )
        check_before(name, variant, experiment)
    prunes = experiment.compress.model is not None
    pruned = [("compress.prune", experiment.compress.prune)]
    pruned += [(f"variants.{as_text(name)}.prune", variant.prune) for name, variant in experiment.variants.items()]
    for where, options in pruned:
        if options and not prunes:
            raise UserError(f"{where} has no effect without compress.model; leave it out")
        if own := [option for option in OWN_OF_PRUNE if option in [part for text in options for part in text.split("=")]]:
            raise UserError(f"{where}: the experiment sets {own[0]} itself for each run; leave it out")
    if prunes and experiment.model:
        raise UserError("model has no effect where compress.model is pruned; leave it out")
    if trains and experiment.model:
        raise UserError("model has no effect where variants are trained; leave it out")
    if experiment.train.overrides and not trains:
        raise UserError("train.overrides has no effect without train.config; leave it out")
    if not experiment.seeds or min(experiment.seeds) < 0 or len(set(experiment.seeds)) < len(experiment.seeds):
        raise UserError(f"seeds {shown(experiment.seeds)} are not allowed; give at least one, each once, none below 0")
    told = [option for row in (experiment, *experiment.variants.values()) for option in row.prompts or ()]
    options = [part for option in told for part in option.split("=")]
    if own := [option for option in OWN_OPTIONS if option in options]:
        raise UserError(f"prompts: the experiment sets {own[0]} itself for each run; leave it out")
    if (trains or prunes) and "--model" in options:
        raise UserError(f"prompts: --model has no effect where variants are {'trained' if trains else 'pruned'}; leave it out")
    for name in experiment.figures:
        figure, of, kind = name.partition(" of ")
        if figure not in (*FIGURES, *MORE_FIGURES):
            allowed = ", ".join((*FIGURES, *MORE_FIGURES))
            raise UserError(f"figures: {shown(name)} is unknown; allowed: {allowed}, also 'all of two'")
        if of and (kind not in KINDS or kind not in options):
            raise UserError(f"figures: {shown(name)} is of a kind that is not asked for; name it after --kinds in prompts")
    if experiment.over not in OVER:
        raise UserError(f"over: {shown(experiment.over)} is not allowed; allowed: {', '.join(OVER)}")
    if experiment.curves and not trains:
        raise UserError("curves has no effect where nothing is trained; leave it out")
    check_grid(experiment)
    for number, claim in enumerate(experiment.claims):
        check_claim(claim, f"claims[{number}]", experiment)
    return experiment


def check_grid(experiment: Experiment) -> None:
    """Raise UserError for a grid without titles, for variants without a place in it, and for two variants at one place."""
    grid, variants = experiment.grid, experiment.variants
    if grid is None:
        if placed := [name for name, variant in variants.items() if variant.at]:
            raise UserError(f"variants.{as_text(placed[0])}.at has no effect without grid; leave it out")
        return
    if not grid.rows or not grid.columns:
        raise UserError("grid needs titles of its rows and columns, in words")
    lengths = (2, 3) if grid.panels else (2,)
    taken: dict[tuple, str] = {}
    for name, variant in variants.items():
        if len(variant.at) not in lengths or not all(isinstance(value, (int, float, str)) for value in variant.at):
            entries = "a row, a column" + (" and, if it has one of its own, a panel" if grid.panels else "")
            raise UserError(f"variants.{as_text(name)}.at is {shown(variant.at)}; give {entries}")
        if (place := tuple(variant.at)) in taken:
            raise UserError(f"variants {shown(taken[place])} and {shown(name)} are both at {shown(variant.at)} of the grid")
        taken[place] = name


def check_claim(claim: Claim, where: str, experiment: Experiment) -> None:
    """Raise UserError for a claim without words, about variants or figures that are not there, or with too few seeds."""
    variants = experiment.variants
    if not claim.text:
        raise UserError(f"{where}.text is empty; state the claim in a sentence")
    least, most = CLAIM_SEEDS
    if not least <= len(experiment.seeds) <= most:
        raise UserError(f"{where}: no verdict follows from {len(experiment.seeds)} seeds; give {least} to {most}")
    sides = [[side] if isinstance(side, str) else side for side in (claim.better, claim.than)]
    named = [*sides[0], *sides[1]]
    for name in named:
        if name not in variants:
            raise UserError(f"{where}: {shown(name)} is no variant; name two of {', '.join(variants)}")
    if not all(sides) or any(len(set(side)) < len(side) for side in sides):
        raise UserError(f"{where}: better and than name a variant each, or a list of different variants")
    if both := [name for name in sides[0] if name in sides[1]]:
        raise UserError(f"{where} compares {shown(both[0])} with itself; name two variants")
    for figure in (claim.figure, *claim.floor):
        if figure not in (*experiment.figures, *experiment.curves):
            known = ", ".join((*experiment.figures, *experiment.curves))
            raise UserError(f"{where}: {shown(figure)} is none of the figures and curves, {known}")
    if claim.figure in experiment.curves and any(variants[name].of for name in named):
        raise UserError(f"{where}: {claim.figure} is a curve of training, which a variant `of` another one has not")
    if wrong := [value for value in claim.floor.values() if not is_number(value)]:
        raise UserError(f"{where}.floor has {shown(wrong[0])}; give the value of chance, a number")


def check_before(name: str, variant: Variant, experiment: Experiment) -> None:
    """Raise UserError for trainings before that cannot run, and for a variant `of` another one that is not there."""
    where, trains = f"variants.{as_text(name)}", experiment.train.config is not None
    if (variant.config or variant.before) and (not trains or experiment.compress.model):
        raise UserError(f"{where}: config and before need train.config, without compress.model; leave them out")
    for earlier, overrides in variant.before.items():
        if earlier in OWN_FILES or not earlier.isidentifier() or not isinstance(overrides, list):
            raise UserError(
                f"{where}.before.{as_text(earlier)} is not allowed; give a word that is none of {', '.join(OWN_FILES)}, and a list "
                "of section.key=value"
            )
    if variant.of is None:
        return
    other = experiment.variants.get(variant.of)
    if variant.train or variant.config or variant.before or not trains or experiment.compress.model or experiment.prompts is None:
        raise UserError(f"{where}.of evaluates a model that another variant trains; give prompts, and no training here")
    if other is None or other.of is not None:
        raise UserError(f"{where}.of {shown(variant.of)} is no variant that is trained; name one of them")
