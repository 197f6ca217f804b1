"""Recovery of a smaller decoder of a video tokenizer: it learns from clips, and from the decoder that it was pruned from.

The encoder and the codes stay as they are. To the error of the training of a tokenizer, the loss of a clip adds

    kd x mean w |x - y|  +  icd x content

for the pixels x of the student and y of the teacher, decoded from the same codes, with the weights w of pixels of that
training. The content loss compares the features behind the levels of both decoders (`lumos.compression.losses.icd`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lumos.compression.distillable import bare
from lumos.compression.features import tapped
from lumos.compression.losses import icd_by_clip
from lumos.compression.networks import DecoderNetwork, copy, copy_others, is_model_folder, weights_sha256
from lumos.compression.record import RECORD, read_record
from lumos.compression.teacher import refuse_same_weights
from lumos.errors import UserError
from lumos.files import replacing_folder, write_json
from lumos.settings import setting
from lumos.training import loop
from lumos.training.task import Measured
from lumos.training.tokenizer.settings import LoopSettings, TokenizerTrainingSettings, loop_settings
from lumos.training.tokenizer.task import TokenizerTask, foreground_weight
from tokenizer.loading import SUBFOLDER
from tokenizer.resizing import same_codes
from tokenizer.video import VideoTokenizer

MODEL_FOLDER = "export"
"""Name of the folder of the whole model with the recovered tokenizer, inside the folder of the run."""
VALUES = ("task_loss", "kd_loss", "icd_loss")


@dataclass
class DecoderDistillSettings(TokenizerTrainingSettings):
    """Settings of the recovery: those of the training of a tokenizer, whose `model` is that of start_from, and the teacher."""

    train_encoder: bool = setting(False, "false: the codes keep their meaning; true is not possible here")
    teacher: str | None = setting(None, "folder of the tokenizer, or of the model with the tokenizer, that the student learns from")
    kd: float = setting(1.0, "weight of the absolute error between the pixels of student and teacher; 0: off", low=0, high=1e9)
    icd: float = setting(
        0.1, "weight of the relative error of features behind each level, frame by frame (individual content distillation); 0: off",
        low=0, high=1e9,
    )  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderDistillSettings:
        """Return the settings of a parsed YAML file, as `TokenizerTrainingSettings.from_dict`; start_from gives the config."""
        start = values.get("start_from")
        known = {"model": DecoderNetwork(start).on_meta().config.to_dict()} if isinstance(start, str) else {}
        return super().from_dict(known | dict(values))

    def check(self) -> None:
        self._allow("start_from", self.start_from is not None, "the folder of the smaller tokenizer, as `compress prune` wrote it")
        self._allow("teacher", self.teacher is not None, "the folder of the tokenizer that start_from was pruned from")
        self._allow("train_encoder", not self.train_encoder, "false: student and teacher decode the same codes")
        self._allow("kd", self.kd > 0 or self.icd > 0, "above 0 with icd 0; without a teacher use train-tokenizer")
        super().check()


def distill_decoder(settings: DecoderDistillSettings) -> dict[str, Any]:
    """Train a smaller decoder; returns the summary of `lumos.training.loop.train`, with measures."""
    return loop.train(loop_settings(settings), DecoderDistillationTask)


class DecoderDistillationTask(TokenizerTask):
    """The training of a tokenizer whose decoder also learns from a teacher; the teacher gets no gradient."""

    settings: DecoderDistillSettings

    def __init__(self, settings: LoopSettings, device: torch.device):
        super().__init__(settings, device)
        folder = Path(self.settings.teacher)
        place = DecoderNetwork(folder).place
        teacher = VideoTokenizer.from_pretrained(place)
        if not same_codes(self.start, teacher):
            raise UserError(f"teacher {folder} has other codes than start_from; name the tokenizer that it was pruned from")
        refuse_same_weights(self.start, teacher, folder)
        widths = [model.config.decoder_widths for model in (self.start, teacher)]
        if self.settings.icd and widths[0] != widths[1]:
            raise UserError(
                f"the levels of the student's decoder have {list(widths[0])} channels, those of the teacher's "
                f"{list(widths[1])}, so their features cannot be compared; set icd=0"
            )
        self.teacher = teacher.to(device).float().eval().requires_grad_(False)
        self.teacher_sha256 = weights_sha256(place)
        self.sums: dict[str, Tensor] = {}
        self.last: dict[str, float] = {}

    def _reconstructed(self, model: nn.Module, video: Tensor, is_world: Tensor) -> tuple[Tensor, Tensor]:
        settings, student = self.settings, bare(model)
        weights = foreground_weight(video, is_world, settings.foreground_weight)
        with ExitStack() as stack:
            codes = stack.enter_context(tapped({"values": student.quantizer}, lambda output: output[0].detach().float()))
            ours, theirs = (stack.enter_context(tapped(levels(x) if settings.icd else {})) for x in (student, self.teacher))
            made = model(video.to(next(model.parameters()).dtype))
            with torch.no_grad():
                target = self.teacher.decode_latent(codes["values"])
        losses = {"task_loss": self._errors(made, video, is_world)}
        total = losses["task_loss"]
        if settings.kd:
            losses["kd_loss"] = (weights * (made - target).abs()).mean(dim=(1, 2, 3, 4))
            total = total + settings.kd * losses["kd_loss"]
        if settings.icd:
            pairs = [[by_frame(found[name]) for name in ours] for found in (ours, theirs)]
            losses["icd_loss"] = icd_by_clip(*pairs)
            total = total + settings.icd * losses["icd_loss"]
        for name, loss in losses.items():
            loss = loss.detach().double()
            self.sums[name] = self.sums.get(name, 0) + torch.stack([loss.sum(), loss.new_tensor(loss.numel())])
        return made, total

    def step_values(self) -> dict[str, tuple[float, float]]:
        sums, self.sums = self.sums, {}
        return {name: tuple(sums[name].tolist()) if name in sums else (0.0, 0.0) for name in VALUES}

    def fault_after(self, means: dict[str, float]) -> str | None:
        self.last = {name: round(mean, 6) for name, mean in means.items()}
        return None

    def resume_fingerprint(self) -> dict[str, Any]:
        found = super().resume_fingerprint() | {"teacher (sha256)": self.teacher_sha256}
        del found["teacher"]
        return found

    def export(self, folder: Path, target: Path) -> Measured:
        """Write the tokenizer folder; if start_from is a whole model, also that model with this tokenizer, in MODEL_FOLDER."""
        measured = super().export(folder, target)
        start, settings = Path(self.settings.start_from), self.settings
        recovery = {"kd": settings.kd, "icd": settings.icd, "teacher": settings.teacher, "teacher_sha256": self.teacher_sha256}
        record = {**read_record(DecoderNetwork(start).place), "recovery": recovery, "losses": self.last}
        write_json(target / RECORD, record)
        if is_model_folder(start):
            with replacing_folder(target.parent / MODEL_FOLDER) as writing:
                copy_others(start, writing, re.compile(SUBFOLDER))
                copy(target, writing / SUBFOLDER)
        return measured


def levels(tokenizer: VideoTokenizer) -> dict[int, nn.Module]:
    """Return the levels of a decoder by number; a level returns a stream [B, C, T, h, w]."""
    return dict(enumerate(tokenizer.decoder.up))


def by_frame(stream: Tensor) -> Tensor:
    """Return a stream [B, C, T, h, w] as features [B, T, h w, C]."""
    return stream.movedim(1, -1).flatten(2, 3)
