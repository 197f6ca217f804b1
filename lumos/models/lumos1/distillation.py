"""Recovery of a pruned decoder: what distillation asks of the training task of Lumos-1.

The one-step result of the decoder is the soft embedding of each masked code, the mean embedding under its prediction. To
judge it, the clip is masked anew with a ratio of the training schedule, and the frozen teacher reads what is left.

Shapes: B clips, L tokens, N masked codes with a loss, C channels; t latent frames of h x w codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lumos.compression.distillable import LEVEL, Distillable, Draws, Features, ForwardPass, Judged, Losses, bare
from lumos.compression.features import tapped
from lumos.data.seeding import sample_generator
from lumos.models.lumos1.attention import attention_for
from lumos.models.lumos1.distillation_loss import distilled_losses, soft_embeddings
from lumos.models.lumos1.flops import training_flops
from lumos.models.lumos1.loss import chunked_cross_entropy
from lumos.models.lumos1.masking import masked_tokens, training_mask
from lumos.models.lumos1.modeling import COMPILED, LumosForVideoGeneration
from lumos.models.lumos1.rope import position_ids
from lumos.models.lumos1.rows import UnencodedSequences
from lumos.models.lumos1.sequence import SequenceLayout, code_mask, content_mask
from lumos.models.lumos1.training import places_of
from lumos.pipeline.acceleration import compile_parts
from lumos.training.task import IGNORED

MASK = "critic_mask"
"""Name of the tensor of a batch, bool [B, L], that is True at the tokens that are masked for the critic."""


class CodePrediction(NamedTuple):
    """Hidden states before the head [N, C], the head [V, C], and the codes to predict, int64 [N]."""

    hidden: Tensor
    head: Tensor
    targets: Tensor


class DistillableLumos(Distillable):
    """Distillation of `LumosForVideoGeneration` on masked codes."""

    same = (
        "vocab_size", "visual_token_start", "visual_token_count", "pad_token_id", "mask_token_id", "newline_token_id",
        "spatial_compression", "temporal_compression", "pixels_per_size_unit", "number_token_start", "number_token_count",
        "prompt_template",
    )  # fmt: skip

    def read_teacher(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        teacher = super().read_teacher(folder, dtype)
        teacher.config.attention = self.task.attention
        if self.task.settings.training.compile:
            compile_parts(teacher, COMPILED)
        return teacher

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return bare(model).model.layers

    def pooled_width(self, teacher: LumosForVideoGeneration) -> int:
        return teacher.config.hidden_size

    def draws(self, step: int, positions: range, prepared: UnencodedSequences) -> Draws:
        masking, length = self.task.settings.masking, prepared.ids.shape[1]
        masks, levels = [], []
        for position, layout, supervised in zip(positions, prepared.batch.rows["layouts"], prepared.supervised_at, strict=True):
            mask, ratios = training_mask(
                masking.kind, layout.num_latent_frames, layout.frames[0].content_length, min_ratio=masking.min_ratio,
                generator=sample_generator(self.task.settings.training.seed, step, position, "critic mask"),
            )  # fmt: skip
            made = torch.tensor([bool(supervised[frame.start : frame.end].any()) for frame in layout.frames])
            masks.append(masked_tokens(layout, mask[list(layout.times)] & made[:, None], length))  # given frames stay as they are
            levels.append(sum(ratios) / len(ratios))
        return Draws({MASK: torch.stack(masks), LEVEL: torch.tensor(levels)}, padded=(MASK,))

    def forward(self, model: nn.Module, micro: dict[str, Any], taps: Sequence[int]) -> ForwardPass:
        layouts, targets, blocks = micro["layouts"], micro["targets"], self.blocks(model)
        with tapped({tap: blocks[tap] for tap in taps}) as found:
            out = model(input_ids=micro["input_ids"], targets=targets, layouts=layouts, with_loss=False)
        prediction = CodePrediction(out.hidden, bare(model).lm_head.weight, targets[targets != IGNORED])
        return ForwardPass(out.row_index, places_of(out, micro), visual_features([found[tap] for tap in taps], layouts), prediction)

    def losses(self, student: ForwardPass, teacher: ForwardPass | None, task: float, kd: float) -> Losses:
        ours, config = student.prediction, self.task.config
        rows = {"first_row": config.visual_token_start, "rows": config.visual_token_count, "chunk": config.loss_chunk_size}
        if teacher is None or kd == 0:
            found = chunked_cross_entropy(*ours, **rows)
            return Losses(task * found, found.detach(), None)
        return Losses(*distilled_losses(*ours, *teacher.prediction[:2], **rows, task=task, kd=kd))

    def teacher_flops(
        self, teacher: LumosForVideoGeneration, prepared: UnencodedSequences, blocks: int | None = None
    ) -> float:
        config, layouts = teacher.config, prepared.batch.rows["layouts"]
        supervised = prepared.supervised_at.sum(1).tolist() if blocks is None else [0] * len(layouts)  # the head comes last
        share = 1.0 if blocks is None else blocks / config.num_hidden_layers
        return share * sum(training_flops(config, *row) for row in zip(layouts, supervised, strict=True)) / 3

    def judged(self, teacher: LumosForVideoGeneration, passed: ForwardPass, micro: dict[str, Any], taps: Sequence[int]) -> Judged:
        layouts, x = micro["layouts"], self.renoised(teacher, self.one_step_result(teacher, passed, micro), micro)
        length, found = x.shape[1], []
        rotary = teacher.rotary(position_ids(layouts, length, teacher.config), content_mask(layouts, length))
        attend = attention_for(teacher.config.attention, layouts, length, x.device)
        for number, layer in enumerate(teacher.model.layers[: taps[-1] + 1]):
            x = layer(x, rotary, attend)
            if number in taps:
                found.append(x)
        starts = torch.tensor([layout.frames[0].start for layout in layouts], device=x.device)[:, None]
        text = (torch.arange(length, device=x.device) < starts)[..., None]
        pooled = (x.detach().float() * text).sum(1) / starts  # causal attention: the prompt knows nothing of the frames
        return Judged(visual_features(found, layouts), pooled)

    def one_step_result(self, teacher: LumosForVideoGeneration, passed: ForwardPass, micro: dict[str, Any]) -> Tensor:
        """Return the soft embeddings [n, C] of the masked codes that stay visible for the critic, in their order.

        The embeddings are those of the teacher, which reads them. Other masked codes are masked again, so theirs are not needed.
        """
        hidden, head, _ = passed.prediction
        shown = ~micro[MASK][micro["targets"] != IGNORED]  # [N]
        config = teacher.config
        return soft_embeddings(
            hidden[shown], head, teacher.model.embed_tokens.weight, first_row=config.visual_token_start,
            rows=config.visual_token_count, chunk=config.loss_chunk_size,
        )  # fmt: skip

    def renoised(self, teacher: LumosForVideoGeneration, result: Tensor, micro: dict[str, Any]) -> Tensor:
        """Return the embeddings [B, L, C] of the clips with the one-step result in them and with the critic's mask."""
        ids, layouts, config = micro["input_ids"], micro["layouts"], teacher.config
        content, codes = (find(layouts, ids.shape[1]).to(ids.device) for find in (content_mask, code_mask))
        ids = torch.where(content & ~codes, config.newline_token_id, ids)
        ids = torch.where(micro[MASK], config.mask_token_id, ids)
        shown = (micro["targets"] != IGNORED) & ~micro[MASK]
        embeds = teacher.model.embed_tokens(ids)
        return embeds.masked_scatter(shown[..., None], result.to(embeds.dtype))


def visual_features(blocks: Sequence[Tensor], layouts: Sequence[SequenceLayout]) -> list[Features]:
    """Return what layers give at the codes of the frames, [B', t, h, w, C] for each layer [B, L, C], by the clips' sizes.

    A picture of the last frame is left out.
    """
    if not blocks:
        return []
    layouts = [SequenceLayout(x.length, tuple(frame for frame in x.frames if frame.stated_time is None)) for x in layouts]
    codes, sizes = code_mask(layouts, blocks[0].shape[1]), {}
    for i, layout in enumerate(layouts):
        sizes.setdefault((len(layout.frames), layout.frames[0].rows, layout.frames[0].cols), []).append(i)
    places = torch.arange(codes.numel()).view(codes.shape)
    return [
        Features(at, codes_of(blocks, places[at][codes[at]].to(blocks[0].device), (len(at), *size))) for size, at in sizes.items()
    ]


def codes_of(blocks: Sequence[Tensor], places: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """Return what layers [B, L, C] give at places of the flattened batch, [*shape, C] each."""
    return [x.flatten(0, 1).index_select(0, places).unflatten(0, shape) for x in blocks]
