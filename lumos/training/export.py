"""Export of a checkpoint, of any engine, as a model folder that `from_pretrained` opens.

A run with LoRA exports an adapter folder. An export needs one process and no DeepSpeed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lumos import registry
from lumos.data.trained_on import TRAINED_ON_FILE, from_json, read_trained_on
from lumos.errors import UserError
from lumos.files import file_sha256, replacing_folder, write_json
from lumos.lora import Lora, read_record, write_adapter
from lumos.pipeline.base import VideoPipeline
from lumos.runtime import no_progress_bar, versions
from lumos.training import checkpoint
from tokenizer.loading import link_tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Tokenizers:
    """The folders of the video and the text tokenizer; `text` may also be a file."""

    video: str
    text: str


@dataclass(frozen=True)
class Mix:
    """Another model with the same tokenizers, and its share in the exported weights, 0 < share < 1.

    A model that is trained further on other data forgets some of what it knew. A mean of the weights
    before and after that training keeps more of both (arXiv 2109.01903).
    """

    folder: str
    share: float

    @classmethod
    def read(cls, folder: str, share: str) -> Mix:
        """Return the mix; raise UserError unless the folder exists and 0 < `share` < 1."""
        try:
            mix = cls(folder, float(share))
        except ValueError:
            mix = cls(folder, 0.0)
        if not 0 < mix.share < 1:
            raise UserError(f"--mix {folder} {share} is not allowed; give a share between 0 and 1, for example 0.3")
        if not Path(folder).is_dir():
            raise UserError(f"--mix: there is no model folder {folder}")
        return mix

    def into(self, weights: dict[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted mean of `weights` and `theirs`, in float32."""
        return {name: torch.lerp(tensor.float(), theirs[name].detach(), self.share) for name, tensor in weights.items()}


def find_checkpoint(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return a checkpoint folder and its state.

    `source` is a checkpoint folder, or the folder of a run, of which the newest undamaged checkpoint
    is taken. Raises UserError if `source` is neither.
    """
    source, found = Path(source), None
    if (source / checkpoint.STATE).is_file():
        found = source, checkpoint.read_state(source, fields=checkpoint.RUN_FIELDS)
    for root in (source / "checkpoints", source):
        found = found or checkpoint.latest(root, fields=checkpoint.RUN_FIELDS)
    if found is None:
        raise UserError(f"{source} is no run, checkpoint or adapter folder; give a run's folder or one of its checkpoints/step-...")
    if "training" not in found[1]["settings"]:
        raise UserError(
            f"{found[0]} is of a training of the video tokenizer, which writes its folder video_tokenizer itself, at the end; "
            "start the same `train-tokenizer` command again to let it finish"
        )
    return found


def export_checkpoint(
    folder: Path,
    state: dict[str, Any],
    out: str | Path,
    *,
    averaged: bool | None = None,
    dtype: str | None = None,
    tokenizers: Tokenizers | None = None,
    mix: Mix | None = None,
    link: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint as a model folder, and return the content of its training.json.

    The folder `out` appears only when it is complete. A run with LoRA is written as an adapter
    folder, for which `mix` is not allowed. `averaged` selects the averaged weights instead of those
    of the last step; by default they are used if the run has them. `dtype` and `tokenizers` are by
    default those of the run. The entry "records" of the task's metadata holds the contents of further
    JSON files by name, to which the number of steps is added. With `link` the model folder names the
    folder of the video tokenizer in video_tokenizer.json in place of a copy.

    Raises UserError if averaged weights do not exist, and if the tokenizers are not those of the run.
    """
    settings, facts = state["settings"], state["task"]
    averaged = state["averaged"] if averaged is None else averaged
    if averaged and not state["averaged"]:
        raise UserError(f"{folder} has no averaged weights (training.ema_decay was 0); export the trained ones: --weights trained")
    dtype = dtype or settings["training"]["export_dtype"]
    tokenizers = tokenizers or Tokenizers(**facts["tokenizers"])
    task = task_class(settings)
    _check_tokenizers(folder, task, facts, tokenizers)
    records = dict(facts.get("records", {}))
    made = {"steps": state["step"], "averaged": averaged, "dtype": dtype, "settings": settings, **versions()}
    if mix is not None:
        if facts["lora"]:
            raise UserError(f"{folder} holds adapters, which --mix cannot mix with a model; leave it out")
        own = Tokenizers(*(str(task.part_of(mix.folder, kind)) for kind in ("video", "text")))
        _check_tokenizers(folder, task, facts, own, "--mix takes a model folder with the run's tokenizers in it")
        files = sorted(Path(mix.folder).glob("*.safetensors"))
        if TRAINED_ON_FILE in records:
            own_words = from_json(records[TRAINED_ON_FILE], folder)
            records[TRAINED_ON_FILE] = own_words.joined(read_trained_on(mix.folder)).as_json()
        made["mix"] = {**vars(mix), "sha256": {file.name: file_sha256(file) for file in files}}
    stored, kind = checkpoint.Stored(folder), checkpoint.AVERAGE if averaged else checkpoint.WEIGHT
    with replacing_folder(out) as writing:
        if facts["lora"]:
            if link:
                raise UserError(f"{folder} holds adapters, which have no video tokenizer to link; leave --link-video-tokenizer out")
            shapes = {name: torch.Size(shape) for name, shape in facts["lora"]["shapes"].items()}
            weights = {name: tensor.to(DTYPES[dtype]) for name, tensor in stored.read_whole(kind, shapes).items()}
            record = {"base": facts["lora"]["base"], "tokenizers": facts["fingerprints"], **made}
            write_adapter(writing, weights, Lora(**facts["lora"]["settings"]), facts["lora"]["base"]["folder"], record)
            write_records(writing, records, state["step"])
            return made
        shapes = task.parameter_shapes(facts)
        weights = stored.read_whole(kind, shapes)
        if mix is not None:
            weights = mix.into(weights, task.weights_to_mix(mix.folder, facts))
        task.write_folder(writing, weights, facts, tokenizers, DTYPES[dtype])
        if link:
            link_tokenizer(writing, Path(tokenizers.video))
        write_json(writing / "training.json", made)
        write_records(writing, records, state["step"])
    return made


def write_records(folder: Path, records: Mapping[str, Any], steps: int) -> None:
    for name, record in records.items():
        write_json(folder / name, {**record, "steps": steps})


def task_class(settings: Mapping[str, Any]) -> type[TrainableGenerator]:
    """Return the task class of the generator that the settings of a run name.

    The settings of earlier versions do not name a generator; the registry then gives the default.
    """
    return registry.generator(settings.get("generator")).load("task")


class TrainableGenerator(Protocol):
    """The part of a generator's task class that an export uses.

    `metadata` is the result of the task's `export_metadata`.
    """

    @staticmethod
    def fingerprint_of(folder: str, kind: str) -> str:
        """Return the fingerprint of the tokenizer of a kind ("video", "text") in a folder."""

    @staticmethod
    def part_of(folder: str, kind: str) -> Path:
        """Return where a model folder has its tokenizer of a kind ("video", "text")."""

    @staticmethod
    def parameter_shapes(metadata: Mapping[str, Any]) -> dict[str, torch.Size]:
        """Return the shapes of the network's parameters, by name."""

    @staticmethod
    def weights_to_mix(folder: str, metadata: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the float32 parameters of another model folder, by name.

        Raises UserError unless that model has the same shape and reads the same sequences.
        """

    @staticmethod
    def write_folder(
        folder: Path, weights: dict[str, Tensor], metadata: Mapping[str, Any], tokenizers: Tokenizers, dtype: torch.dtype
    ) -> None:
        """Write a complete model folder, tokenizers included, that the generator's pipeline opens."""


def export_merged(
    folder: Path, state: dict[str, Any], base: str | None, out: str | Path, *, dtype: str | None, tokenizers: Tokenizers | None,
    averaged: bool | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a checkpoint of a run with LoRA as a model folder: the base model with the adapters merged in.

    `base` is the folder of the base model; None: the folder on which the run was trained. The other
    arguments and the result are those of `export_checkpoint`.
    """
    with tempfile.TemporaryDirectory() as place:
        adapter = Path(place) / "adapter"
        made = export_checkpoint(folder, state, adapter, averaged=averaged, dtype="float32")
        dtype = dtype or state["settings"]["training"]["export_dtype"]
        export_adapter(adapter, base, out, dtype=dtype, tokenizers=tokenizers, made={**made, "dtype": dtype})
    return {**made, "dtype": dtype}


def export_adapter(
    adapter: str | Path, base: str | None, out: str | Path, *, dtype: str, tokenizers: Tokenizers | None,
    made: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """Write a model folder, the base model with an adapter folder merged in; return the base folder.

    `base` is the folder of the base model; None: the folder that the adapter names. `made` is the
    content of training.json; by default it names the adapter. Raises UserError if `base` is None and
    the adapter names no base model.
    """
    record = read_record(Path(adapter))
    base = base or (record and record["base"]["folder"])
    if base is None:
        raise UserError(f"{adapter} does not say on which base model it was trained; name the model with --model")
    places = {} if tokenizers is None else {"video_tokenizer": tokenizers.video, "text_tokenizer": tokenizers.text}
    with no_progress_bar(), replacing_folder(out) as writing:
        pipe = VideoPipeline.from_pretrained(base, lora=adapter, device="cpu", dtype=torch.float32, **places)
        pipe.model.to(DTYPES[dtype])
        pipe.model.config.dtype = DTYPES[dtype]
        pipe.video_tokenizer.to(DTYPES[dtype])
        pipe.save_pretrained(writing)
        facts = made or {"adapter": str(adapter), "dtype": dtype, **versions()}
        write_json(writing / "training.json", {"base": str(base), **facts})
    return base


def _check_tokenizers(
    folder: Path, task: type[TrainableGenerator], facts: dict[str, Any], tokenizers: Tokenizers,
    remedy: str = "name the run's with --video-tokenizer and --text-tokenizer",
) -> None:  # fmt: skip
    """Raise UserError, with `remedy`, unless the tokenizers have the fingerprints of the run's tokenizers."""
    try:
        found = {kind: task.fingerprint_of(getattr(tokenizers, kind), kind) for kind in facts["fingerprints"]}
    except (ValueError, OSError) as error:
        raise UserError(f"the tokenizers of {folder} cannot be read: {error}; {remedy}") from error
    for kind, fingerprint in facts["fingerprints"].items():
        if found[kind] != fingerprint:
            other = f"{getattr(tokenizers, kind)} is another {kind} tokenizer"
            raise UserError(f"{other} than the one that {folder} was trained with; {remedy}")
