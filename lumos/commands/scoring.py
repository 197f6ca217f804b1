"""Functions of the steps of `compress` that need scores: clips to score on, scores, and the file of scores."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from lumos.compression.networks import GeneratorNetwork, Network

BATCH_SIZE = 4
MAX_STEPS = 10**6
LEARNED, FRECHET, HISTORY = "learned", "frechet", "history"
"""Measures beside those of `lumos.compression.importance`."""
MEASURES = ("loss", "bi", "output", "magnitude", "taylor", "elbo", LEARNED, FRECHET, HISTORY)
MAX_SCORES_BYTES = 2**26


def add_clips(parser: argparse.ArgumentParser, count: int) -> None:
    """Add the flags for the clips that units are scored on."""
    add = parser.add_argument
    add("--data", help="folder of shards that `ingest` wrote; default: synthetic scenes")
    add("--clips", type=int, default=count, help="clips to score on; they are the same in every run; default: %(default)s")
    add("--batch-size", type=int, default=BATCH_SIZE, help="clips in a forward pass; default: %(default)s")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")


def add_measures(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the measures that train gates and that generate clips."""
    add = parser.add_argument
    add("--gate-steps", type=int, default=200, help="learned: steps in which the gates are trained; default: %(default)s")
    add("--sparsity", type=float, default=1.0, help="learned: a unit is worth its gate if it lowers the loss by more than this "
        "number times the mean share of a unit; default: %(default)s")  # fmt: skip
    add("--frechet-clips", type=int, default=16, help="frechet: clips of synthetic scenes to generate without each unit, at least "
        "2; default: %(default)s")  # fmt: skip


class Scorer:
    """Scores units of a network on fixed clips, which are made once.

    measures  what is scored, see `lumos.compression.importance`, and LEARNED, FRECHET and HISTORY
    facts     how LEARNED and FRECHET are measured, and the whole network's gain from history, for the record
    """

    def __init__(self, args: argparse.Namespace, network: Network, measures: Sequence[str]):
        import torch

        from lumos.commands.counts import MAX_BATCH, MAX_CLIPS, MAX_SEED, check_counts
        from lumos.errors import UserError
        from lumos.pipeline.frechet import FEATURES
        from lumos.runtime import pick_device

        check_counts(args, clips=(1, MAX_CLIPS), batch_size=(1, MAX_BATCH), gate_steps=(1, MAX_STEPS), frechet_clips=(2, MAX_CLIPS),
                     seed=(0, MAX_SEED))  # fmt: skip
        if not 0 <= args.sparsity < float("inf"):
            raise UserError(f"--sparsity {args.sparsity:g} is not allowed; give 0 or a number above")
        if FRECHET in measures and network.part == "decoder":
            raise UserError("the measure frechet generates clips with a whole model; leave it out for a decoder")
        self.measures, self.device = list(measures), pick_device(args.device)
        self.args, self.network, self.facts = args, network, {}
        if LEARNED in measures:
            self.facts["gates"] = {"steps": args.gate_steps, "sparsity": args.sparsity, "seed": args.seed}
        if FRECHET in measures:
            self.facts |= {"frechet_clips": args.frechet_clips, "frechet_features": FEATURES}
        self.model = network.load(torch.float32).to(self.device)
        self.data, self.probe, self.batches = {"worlds": "validation"}, None, []
        if set(measures) - {"magnitude", FRECHET}:  # measures of the weights alone, and of generated clips
            (self._of_decoder if network.part == "decoder" else self._of_generator)(args, network)
        if HISTORY in measures and (not hasattr(self.probe, "with_and_without_history") or network.clip.num_frames == 1):
            raise UserError("the measure history needs a model that generates a clip frame by frame; leave it out")

    def _of_generator(self, args: argparse.Namespace, network: Network) -> None:
        if args.data:
            self.data = {"shards": args.data}
        self.probe, self.batches = clips_of(network, self.device, args.clips, args.batch_size, args.data)

    def _of_decoder(self, args: argparse.Namespace, network: Network) -> None:
        from lumos.compression.decoder_probe import DecoderProbe
        from lumos.data.seeding import VALIDATION_SEED, VALIDATION_STEP, sample_index
        from lumos.data.synthetic.sampling import SyntheticScenes
        from lumos.errors import UserError

        if args.data:
            raise UserError(f"--data {args.data} has no effect on a decoder, whose pixels are compared with clips that shards lack")
        clip = network.clip
        shape = {name: getattr(clip, name) for name in ("num_frames", "fps", "height", "width")}
        scenes = SyntheticScenes(seed=VALIDATION_SEED, **shape)
        self.probe = DecoderProbe(self.model)
        clips = (scenes[sample_index(VALIDATION_STEP, position)][0] for position in range(args.clips))
        self.batches = list(self.probe.batches(clips, args.batch_size))

    def score(self, kind: str, removed: Sequence[str] = ()) -> dict[str, Any]:
        """Return the scores of the units of a kind, in the network without those that are removed; see `importance.score`.

        Raises RunError for scores that are not finite.
        """
        from lumos.compression import importance
        from lumos.compression.gates import GateSettings, learned_gates
        from lumos.compression.history import history_gains
        from lumos.errors import RunError
        from lumos.progress import progress_bar

        units = {name: owned for name, owned in self.model.units(kind).items() if name not in removed}
        usual, args, more = [name for name in self.measures if name in importance.MEASURES], self.args, {}
        passes = (1 + len(units) * bool(importance.SKIPPING & set(usual))) * bool(usual)
        passes += 2 * (1 + len(units)) * (HISTORY in self.measures)
        total = len(self.batches) * passes + args.gate_steps * (LEARNED in self.measures)
        with progress_bar(total=total, unit="pass", leave=False) as bar, self.model.skipping(removed):
            found = importance.score(self.probe, self.model, self.batches if usual else [], units, usual, bar.update)
            if LEARNED in self.measures:
                gates = GateSettings(args.gate_steps, args.sparsity, seed=args.seed)
                more[LEARNED] = learned_gates(self.probe, self.model, self.batches, list(units), gates, bar.update)
            if HISTORY in self.measures:
                gains = history_gains(self.probe, self.model, self.batches, list(units), bar.update)
                more[HISTORY] = {name: gains[importance.WHOLE] - gains[name] for name in units}
                self.facts["history_gain"] = gains[importance.WHOLE]
        if FRECHET in self.measures:
            more[FRECHET] = self._frechet(kind, list(units), removed)
        for name, entry in found["units"].items():
            entry |= {measure: values[name] for measure, values in more.items()}
            if any(isinstance(value, float) and not math.isfinite(value) for value in entry.values()):
                raise RunError(f"scores of {self.network.folder} are not finite, for example those of unit {name}; its weights are "
                               "damaged or too large: copy the model again, or train it again")  # fmt: skip
        return found

    def _frechet(self, kind: str, units: Sequence[str], removed: Sequence[str]) -> dict[str, float]:
        from lumos.compression.frechet import frechet_scores
        from lumos.data.seeding import VALIDATION_SEED
        from lumos.data.synthetic.sampling import SyntheticScenes
        from lumos.errors import UserError
        from lumos.pipeline.base import VideoPipeline
        from lumos.progress import progress_bar
        from lumos.runtime import no_progress_bar

        if not self.model.unit_kinds[kind]:
            raise UserError(f"no clips can be generated without units of the kind {kind}, which always stay; leave frechet out")
        count, clip = self.args.frechet_clips, self.network.clip
        scenes = SyntheticScenes(
            seed=VALIDATION_SEED, num_frames=clip.num_frames, fps=clip.fps, height=clip.height, width=clip.width
        )
        with no_progress_bar():
            pipe = VideoPipeline.from_pretrained(self.network.folder, device=self.device)
        pipe.model = self.model
        prompts = [scenes.scene(i).caption for i in range(count)]
        with progress_bar(total=count * (len(units) + 1), unit="clip", leave=False) as bar:
            return frechet_scores(pipe, units, prompts, bar.update, removed=removed, seed=self.args.seed)


def clips_of(
    network: GeneratorNetwork, device: torch.device, count: int, batch_size: int = BATCH_SIZE, shards: str | None = None
) -> tuple[Any, list[dict[str, Any]]]:
    """Return the training task of a model and micro-batches of held-out clips, which are the same in every run.

    shards: folder of shards; None: synthetic scenes.
    """
    from lumos.data.curriculum import StepShape
    from lumos.data.seeding import VALIDATION_STEP
    from lumos.training.settings import build_settings

    clip, kind = network.clip, "image" if network.clip.num_frames == 1 else "video"
    data: dict[str, Any] = {"num_frames": clip.num_frames, "validation_clips": count, "workers": 0}
    if shards:
        data |= {"source": "shards", "path": shards}
    else:
        data |= {"height": clip.height, "width": clip.width, "fps": clip.fps}
    if kind == "image":
        data["stages"] = [{"image_share": 1.0}]
    task_class = network.generator.load("task")
    settings = build_settings({
        "generator": network.generator.name, "model": {"from": str(network.folder)}, "data": data,
        "training": {"eval_every": 1, "device": device.type}, **task_class.score_settings(network.config),
    })  # fmt: skip
    task, shape = task_class(settings, device), StepShape(kind, count)
    parts = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return task, [task.batch(VALIDATION_STEP, shape, positions, dropout=False).whole for positions in parts]


def kind_of(network: Any, kind: str | None) -> str:
    """Return the kind of units that is meant; None is the usual one. Raises UserError for an unknown kind."""
    from lumos.errors import UserError, instead, shown

    known = network.unit_kinds
    if kind is not None and kind not in known:
        raise UserError(f"--units {shown(kind)} is unknown{instead(kind, known)}")
    return next(iter(known)) if kind is None else kind


def read_scores(path: str | Path, network: Network, kind: str) -> dict[str, Any]:
    """Return the content of a file that `compress score` wrote.

    Raises UserError for a file of another kind, and for scores of another checkpoint, part or kind of units.
    """
    from lumos.errors import UserError, shown
    from lumos.files import read_json

    found = read_json(path, "scores of `compress score`", MAX_SCORES_BYTES)
    if not isinstance(found, dict) or not isinstance(found.get("scores"), dict) or "sha256" not in found:
        raise UserError(f"{path} holds no scores; give a file that `python -m lumos compress score` wrote")
    if found["sha256"] != (own := network.sha256):
        raise UserError(
            f"{path} has the scores of another checkpoint, {shown(found.get('model'))} (sha256 {shown(str(found['sha256'])[:12])}, "
            f"not {own[:12]}); score this one"
        )
    if (of := (found.get("part"), found.get("units"))) != (network.part, kind):
        raise UserError(f"{path} has scores of {' '.join(map(str, of))}, and {network.part} {kind} is asked for; score these units")
    if found["scores"].keys() != (units := network.on_meta().units(kind)).keys():
        raise UserError(f"{path} has other units than the {len(units)} of the kind {kind} in {network.folder}; score them again")
    return found


def distances_of(scores: dict[str, Any], count: int) -> list[list[float]]:
    """Return the distances between `count` layers, for `plans.middle`. Raises UserError for scores that lack them."""
    from lumos.errors import UserError
    from lumos.settings import is_finite

    def is_row(row: Any) -> bool:
        return isinstance(row, list) and len(row) == count + 1

    rows = scores.get("distances")
    if not is_row(rows) or not all(is_row(row) and all(map(is_finite, row)) for row in rows):
        raise UserError("the plan middle needs the distances between whole layers; score them with --measures bi")
    return rows


def importance(scores: dict[str, Any], measure: str) -> dict[str, float]:
    """Return {unit: importance by a measure}. Raises UserError if it was not measured, or is not defined for a unit."""
    from lumos.errors import UserError
    from lumos.settings import is_finite

    units = scores["scores"] if "scores" in scores else scores["units"]
    found = {name: entry.get(measure) for name, entry in units.items() if isinstance(entry, dict)}
    for name in units:
        if not is_finite(found.get(name)):
            raise UserError(f"the scores have no {measure} of unit {name}; score it with --measures {measure}")
    return found
