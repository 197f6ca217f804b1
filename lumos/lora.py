"""Low-rank adapters (LoRA, arXiv 2106.09685): add them to a model for training, write and read them, merge them.

    <folder>/adapter_config.json, adapter_model.safetensors    the format of peft, which other programs read too
    <folder>/lumos_adapter.json                                the base model, the tokenizers and the training

The library peft does the work. It is installed with the extra [lora], and only this module needs it.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lumos.errors import UserError, as_text, reason_of, shown
from lumos.files import read_json, write_json
from lumos.settings import is_whole
from tokenizer.fingerprint import tokenizer_facts
from tokenizer.text import find_tokenizer_file
from tokenizer.video import VideoTokenizer

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "lumos_adapter.json"
MAX_RECORD_BYTES = 2**26
MAX_RANK = 2**16
SAMPLE = 8
"""The number of values of each base tensor that an adapter stores, to recognise its base model."""


@dataclass(frozen=True)
class Lora:
    """The settings of an adapter.

    rank     columns of the low-rank matrices
    alpha    the product of the two matrices is scaled by alpha / rank
    dropout  dropout probability on the input
    targets  names of the linear layers that get an adapter
    """

    rank: int
    alpha: float
    dropout: float
    targets: list[str]


def import_peft() -> ModuleType:
    """Return the module peft. Raises UserError with the name of the extra if it is not installed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # peft imports DeepSpeed, which warns that it found no accelerator
    try:
        import peft
    except ImportError as error:
        raise UserError(f"LoRA adapters need peft, which is not installed ({error}); pip install 'lumos-video[lora]'") from error
    return peft


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def check_no_adapter(folder: str | Path) -> None:
    """Raise UserError if a folder holds an adapter, which transformers would load together with a model in it."""
    if is_adapter(folder):
        raise UserError(f"{folder} holds an adapter, which would be loaded with a model in it; give each a folder of its own")


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Add new adapters to the model and freeze all other parameters. New adapters do not change its output."""
    peft = import_peft()
    peft.inject_adapter_in_model(_peft_config(lora), model)


def sample(model: nn.Module) -> dict[str, list[float]]:
    """Return the first values of each parameter by name.

    They tell apart two base models of the same shape, whatever dtype each is stored in.
    """
    return {name: p.detach().flatten()[:SAMPLE].float().cpu().tolist() for name, p in model.named_parameters()}


def fingerprints(video_tokenizer: str | Path, text_tokenizer: str | Path) -> dict[str, str]:
    """Return the fingerprints of a video and a text tokenizer. A copy in float16 has the same fingerprint."""
    video = tokenizer_facts(VideoTokenizer.from_pretrained(video_tokenizer))["fingerprint"]
    return {"video": video, "text": text_fingerprint(text_tokenizer)}


def text_fingerprint(text_tokenizer: str | Path) -> str:
    return hashlib.sha256(find_tokenizer_file(Path(text_tokenizer)).read_bytes()).hexdigest()


def write_adapter(folder: Path, weights: dict[str, Tensor], lora: Lora, base: str, record: dict[str, Any]) -> None:
    """Write an adapter folder.

    `weights` are named as in a model after `add_adapters`. `base` is the folder of the base model.
    `record` is the content of lumos_adapter.json and holds at least "base" and "tokenizers".
    """
    config = _peft_config(lora)
    config.inference_mode, config.base_model_name_or_path = True, base
    config.save_pretrained(str(folder))
    named = {f"base_model.model.{name.replace('.default.', '.')}": tensor.contiguous() for name, tensor in weights.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / RECORD, record)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the content of lumos_adapter.json, or None with a warning if the folder has none.

    Adapters from other programs have none. Raises UserError if the file is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        warnings.warn(f"{folder} has no {RECORD}: it may have been trained on another base model or with other tokenizers")
        return None
    try:
        record = read_json(file, "the record of an adapter", MAX_RECORD_BYTES)
        base, tokenizers = record["base"], record["tokenizers"]
        if not isinstance(base["sample"], dict) or not isinstance(base["folder"], str | None):
            raise TypeError("base.sample must be an object, base.folder a text")
        if not tokenizers.keys() <= {"video", "text"}:
            raise KeyError(f"tokenizers {shown([*tokenizers])}")
        for values in base["sample"].values():
            if len(values) > SAMPLE or not all(isinstance(value, int | float) for value in values):
                raise TypeError(f"base.sample holds {shown(values, 60)}")
        return record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({reason_of(error)}); copy the adapter again") from error


def merge_adapter(model: nn.Module, folder: str | Path, tokenizers: dict[str, str]) -> nn.Module:
    """Merge an adapter folder into the weights of a model and return the model.

    The result runs as fast as the base model and is saved like any model. `tokenizers` are the
    `fingerprints` of the tokenizers of the model. Raises UserError if the folder is not a LoRA adapter or
    is damaged, or if it was trained on another base model or with other tokenizers.
    """
    peft, folder = import_peft(), Path(folder)
    if not is_adapter(folder):
        raise UserError(f"{folder} is no adapter folder: it has no {CONFIG}; give what a run with lora.rank exported")
    record = read_record(folder)
    if record is not None:
        _check_base(model, folder, record["base"])
        for kind, fingerprint in record["tokenizers"].items():
            if tokenizers[kind] != fingerprint:
                raise UserError(f"{folder} was trained with another {kind} tokenizer than the one that is used now; give that one")
    if not isinstance(stored := read_json(folder / CONFIG, "an adapter's config", MAX_RECORD_BYTES), dict):
        raise UserError(f"{folder / CONFIG} holds {shown(stored, 60)}; an adapter's config is a JSON object")
    if stored.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds an adapter of type {as_text(stored.get('peft_type'))}; allowed: LORA")
    if not is_whole(rank := stored.get("r")) or not 1 <= rank <= MAX_RANK:
        raise UserError(f"{folder / CONFIG} has the rank r {shown(rank)}; allowed: 1 to {MAX_RANK:,}")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        weights = load_file(folder / WEIGHTS)
    except Exception as error:  # peft raises errors of any class for a wrong field
        raise UserError(f"{folder} cannot be read ({reason_of(error)}); copy the adapter again") from error
    smallest = min((sum(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)), default=0)
    if rank * smallest > sum(tensor.numel() for tensor in weights.values()):  # check before peft allocates the adapters
        raise UserError(f"{folder} has fewer weights than an adapter of rank {rank}, which its {CONFIG} says; copy it again")
    config.base_model_name_or_path = None  # peft would warn if the base model's folder was moved
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads an attribute of transformers by its old name
            wrapped = peft.get_peft_model(model, config)
    except Exception as error:  # as above; peft first uses most fields here
        raise UserError(f"{folder} does not fit this model: {reason_of(error)}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in peft.get_peft_model_state_dict(wrapped).items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{folder} is for another model: {as_text(name, 80)} has shape {found.get(name)}, this model needs "
                f"{expected.get(name)}"
            )
    peft.set_peft_model_state_dict(wrapped, weights)
    return wrapped.merge_and_unload()


def _check_base(model: nn.Module, folder: Path, base: dict[str, Any]) -> None:
    ours, theirs = sample(model), base["sample"]
    for name in sorted(ours.keys() | theirs.keys()):
        here, there = (torch.tensor(values.get(name, ())) for values in (ours, theirs))
        # The tolerance is the rounding of bfloat16, because the same weights in another dtype are the same model.
        if here.shape != there.shape or not torch.allclose(here, there, rtol=2**-7, atol=1e-6):
            raise UserError(
                f"{folder} was trained on another base model, {as_text(base['folder'])} ({as_text(name, 80)} differs); "
                "give that one with --model"
            )


def _peft_config(lora: Lora) -> Any:
    return import_peft().LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
