"""Checks that a model can teach a student: it is of the same generator, reads the same tokens, and is another model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lumos import registry
from lumos.errors import UserError, shown
from lumos.training.video_task import VideoTask


def check_teacher(folder: Path, student: VideoTask, same: Collection[str]) -> None:
    """Raise UserError unless the model in a folder can teach the student.

    same: fields of the config that both must have in common.
    """
    generator = registry.generator_of(folder)
    if generator.name != student.settings.generator:
        raise UserError(
            f"distill.teacher {folder} is a model of the generator {generator.name}, the student one of "
            f"{student.settings.generator}; name a model of that generator"
        )
    own = student.settings.model.from_
    if own is not None and Path(own).is_dir() and Path(own).resolve() == folder.resolve():
        raise UserError(f"distill.teacher {folder} is the student itself (model.from); name the model that it was pruned from")
    config = student.read_config(folder)
    for name in same:
        found, wanted = getattr(config, name), getattr(student.config, name)
        if found != wanted:
            raise UserError(
                f"distill.teacher {folder} has {name} {shown(found)}, but the student has {shown(wanted)}; name the model that it "
                "was pruned from"
            )
    for kind, fingerprint in student.fingerprints.items():
        place = student.part_of(str(folder), kind)
        if not place.exists():
            raise UserError(f"distill.teacher {folder} has no {kind} tokenizer at {place}; name a whole model folder")
        if student.fingerprint_of(str(place), kind) != fingerprint:
            raise UserError(
                f"distill.teacher {folder} has another {kind} tokenizer than the student ({getattr(student.places, kind)}); name "
                "the model that it was pruned from"
            )


def refuse_same_weights(student: nn.Module, teacher: nn.Module, folder: Any) -> None:
    """Raise UserError if the student has the weights of the teacher, up to the rounding of the teacher's number format."""
    ours, theirs = student.state_dict(), teacher.state_dict()
    if ours.keys() == theirs.keys() and all(
        x.shape == theirs[name].shape and torch.equal(x.to(theirs[name]), theirs[name]) for name, x in ours.items()
    ):
        raise UserError(f"the teacher {folder} has the weights of the student, so there is nothing to learn; give the pruned model")
