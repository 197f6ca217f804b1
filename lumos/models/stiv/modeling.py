"""The transformer of STIV: it maps noisy latents, a time and conditions to a velocity.

- A block has spatial attention within a frame, temporal attention at a place, cross-attention to the text and an MLP.
- Norms stand before and after each unit (sandwich) and have no weights; queries and keys have an RMSNorm.
- One shared AdaLN modulates spatial attention and MLP of all blocks; a block may add a table of its own.
- Each condition is normalised before the conditions are added.
- Given frames may have their own time, so modulation is a value a frame.
- In training, places may be dropped (MaskDiT): the main blocks see the rest, the last blocks see all.

Shapes: B batch, T latent frames, C latent channels, h w latent rows and columns; in tokens f frames, s places of
a frame, d channels, P values of a patch; m text tokens, e text width. Times run from 0 (noise) to 1 (data).
Source: arXiv 2412.07730; the order of the units and MaskDiT follow reference, sections 2 and 9.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import AutoModel
from transformers.utils import ModelOutput

from lumos.compression.prunable import PrunableStack
from lumos.files import updating_folder
from lumos.lora import check_no_adapter
from lumos.models.stiv.attention import StivRMSNorm, ZeroLinear, save_attention_outputs
from lumos.models.stiv.block import Block
from lumos.models.stiv.block_reuse import BlockReuse
from lumos.models.stiv.configuration import HEAD_DIM, PARTS, StivConfig
from lumos.models.stiv.flow import velocity_of_noise
from lumos.models.stiv.fused import norm, normed_sum
from lumos.models.stiv.loading import check_folder
from lumos.models.stiv.rope import rotary, spatial_angles, temporal_angles
from lumos.models.stiv.text_encoder import SmallTextEncoder, TextStates

MODEL_FILES = r"config\.json|model.*\.safetensors(\.index\.json)?"  # files that `save_pretrained` writes
SINUSOIDS = 256  # channels of a scalar condition
TIME_SCALE = 1000.0


@dataclass
class StivOutput(ModelOutput):
    """The output of `StivForVideoGeneration`: the velocity [B, T, C, h, w], float32."""

    sample: Tensor | None = None


@dataclass
class Micro:
    """Micro conditions of clips: facts about the source of a clip.

    original_size   [B, 2], height and width of the source in pixels
    crop            [B, 2], top and left of the crop in pixels
    stride          [B], frames of the source from one frame of the clip to the next
    num_frames      [B], frames of the clip
    """

    original_size: Tensor
    crop: Tensor
    stride: Tensor
    num_frames: Tensor

    @classmethod
    def default(cls, config: StivConfig, batch: int, frames: int, height: int, width: int, device=None) -> Micro:
        """Return the conditions of generated clips: the output's size, no crop, the model's stride.

        frames, height, width: of the latents.
        """
        size = [height * config.spatial_compression, width * config.spatial_compression]
        rows = (size, [0, 0], config.micro_stride if frames > 1 else 1, config.pixel_frames(frames))
        return cls(*(torch.tensor(row, dtype=torch.float32, device=device).expand(batch, *([2] if isinstance(row, list) else []))
                     for row in rows))  # fmt: skip

    def to(self, device: torch.device | str) -> Micro:
        """Return the conditions on a device."""
        return Micro(*(getattr(self, f.name).to(device) for f in fields(self)))

    def repeated(self, times: int) -> Micro:
        """Return the conditions of a batch that holds the clips `times` times."""
        return Micro(*(torch.cat([getattr(self, f.name)] * times) for f in fields(self)))




def sinusoids(values: Tensor) -> Tensor:
    """Return cos and sin of scalars, float32: [..., k] -> [..., k * SINUSOIDS]; the longest period is 2 pi x 10,000."""
    half = SINUSOIDS // 2
    frequencies = torch.exp(torch.arange(half, device=values.device).float() * (-math.log(10_000.0) / half))
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(-2)


def patches(latents: Tensor, config: StivConfig) -> Tensor:
    """Cut latents into patches: [B, T, C, h, w] -> [B, f, s, P]; a patch is ordered (frame, channel, row, column)."""
    p, pt = config.patch_size, config.temporal_patch_size
    cut = latents.unflatten(1, (-1, pt)).unflatten(4, (-1, p)).unflatten(6, (-1, p))  # [B, f, pt, C, rows, p, columns, p]
    return cut.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(2, 3)


def unpatched(x: Tensor, rows: int, config: StivConfig) -> Tensor:
    """Put patches together: [B, f, s, P] -> [B, T, C, h, w]; the inverse of `patches`."""
    p, pt = config.patch_size, config.temporal_patch_size
    cut = x.unflatten(2, (rows, -1)).unflatten(4, (pt, config.latent_channels, p, p))  # [B, f, rows, columns, pt, C, p, p]
    return cut.permute(0, 1, 4, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)


class ConditionLinear(nn.Linear):
    """A linear layer that starts with normal weights of standard deviation 0.02."""


class ConditionMLP(nn.Sequential):
    """The MLP of a condition of `scalars` numbers."""

    def __init__(self, scalars: int, width: int):
        super().__init__(ConditionLinear(scalars * SINUSOIDS, width), nn.SiLU(), ConditionLinear(width, width))


class Conditions(nn.Module):
    """The sum of all conditions, each normalised (`condition_norm`): time, micro conditions and pooled text."""

    def __init__(self, config: StivConfig):
        super().__init__()
        d = config.hidden_size
        self.time, self.stride, self.num_frames = (ConditionMLP(1, d) for _ in range(3))
        self.original_size, self.crop = (ConditionMLP(2, d) for _ in range(2))
        self.text = nn.Linear(config.text_width, d)
        self.norm = norm if config.condition_norm else nn.Identity()

    def forward(self, times: Tensor, micro: Micro, pooled: Tensor) -> Tensor:
        """times [B, f or 1], micro, pooled [B, e] -> [B, f or 1, d]."""
        dtype = self.text.weight.dtype
        c = self.norm(self.time(sinusoids(times[..., None] * TIME_SCALE).to(dtype)))
        of_clip = self.norm(self.text(pooled.to(dtype)))
        for field in fields(micro):
            values = getattr(micro, field.name).to(times.device).reshape(len(times), -1)
            of_clip = of_clip + self.norm(getattr(self, field.name)(sinusoids(values).to(dtype)))
        return c + of_clip[:, None]


class StivForVideoGeneration(PrunableStack, PreTrainedModel):
    """The transformer, and the small text encoder if the config asks for it (`text_encoder`)."""

    stack, mlp_width = "blocks", "mlp_ratio"
    unit_kinds: ClassVar[dict[str, bool]] = {"block": True, "temporal": True, "cross": True, "mlp": True, "spatial": False}
    parts: ClassVar[dict[str, tuple[str, ...]]] = {name: (name,) for name in PARTS} | {"temporal": ("temporal", "temporal_gain")}
    mlp_channels: ClassVar[dict[str, int]] = {"up_proj.weight": 0, "up_proj.bias": 0, "down_proj.weight": 1}
    config_class = StivConfig
    base_model_prefix = ""
    main_input_name = "latents"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block", "TextBlock")

    def __init__(self, config: StivConfig):
        super().__init__(config)
        d = config.hidden_size
        self.text_encoder = SmallTextEncoder(config) if config.text_encoder == "small" else None
        self.patch_in = nn.Linear(config.patch_channels, d)
        self.conditions = Conditions(config)
        self.modulation = ZeroLinear(d, 6 * d)
        self.text_in = nn.Sequential(nn.Linear(config.text_width, d), nn.GELU(approximate="tanh"), nn.Linear(d, d))
        self.mask_token = nn.Parameter(torch.zeros(d))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.final_modulation = ZeroLinear(d, 2 * d)
        self.patch_out = ZeroLinear(d, config.patch_channels)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module's own weights. A parent cannot do it for a child: transformers initialises a weight once."""
        if isinstance(module, nn.Linear):
            if isinstance(module, ZeroLinear):
                nn.init.zeros_(module.weight)
            elif isinstance(module, ConditionLinear):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, StivRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Block):
            if module.temporal_gain is not None:
                nn.init.ones_(module.temporal_gain)
            if module.table is not None:
                nn.init.zeros_(module.table)
        elif isinstance(module, StivForVideoGeneration):
            nn.init.normal_(module.mask_token, std=0.02)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> StivForVideoGeneration:
        """Load a model as in transformers.

        Raises UserError if the folder is incomplete or damaged, and lists tensors that are missing, unknown or of
        another shape.
        """
        if (name := pretrained_model_name_or_path) is not None:
            check_folder(Path(name, kwargs.get("subfolder") or ""), cls, kwargs.get("config"))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """Write a model folder as in transformers.

        If the process is killed, the folder holds the old model or the new one, never a part. Other files of the folder
        are kept.
        """
        if kwargs.get("push_to_hub") or not is_main_process:
            super().save_pretrained(save_directory, is_main_process, **kwargs)
            return
        check_no_adapter(save_directory)
        with updating_folder(save_directory, re.compile(MODEL_FILES).fullmatch) as writing:
            super().save_pretrained(writing, **kwargs)

    def changes(self, kept: Sequence[int], lost: Sequence[str]) -> dict[str, Any]:
        config, place = self.config, {str(before): after for after, before in enumerate(kept)}
        earlier = [name.split(".") for name in config.without or ()]
        without = [*lost, *(f"{place[index]}.{part}" for index, part in earlier if index in place)]
        late = sum(i >= config.num_hidden_layers - config.unmasked_layers for i in kept)
        return super().changes(kept, lost) | {"without": sorted(without) or None, "unmasked_layers": max(1, late)}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **more) -> None:
        """Recompute the blocks in the backward pass, as in transformers.

        The outputs of self-attention are saved. Another context_fn saves more (`save_product_outputs`) or nothing
        (`torch.utils.checkpoint.noop_context_fn`).
        """
        chosen = {"use_reentrant": False, "context_fn": save_attention_outputs} | (gradient_checkpointing_kwargs or {})
        super().gradient_checkpointing_enable(chosen, **more)

    def encode_text(self, ids: Tensor, mask: Tensor) -> TextStates:
        """Encode prompts by the small text encoder: ids int64 [B, m], mask bool [B, m] (`text_encoder.text_ids`).

        Raises ValueError if the model has none, because its text encoder is a folder.
        """
        if self.text_encoder is None:
            raise ValueError("this model has no text encoder of its own; its config names a folder (FrozenTextEncoder)")
        return self.text_encoder(ids, mask)

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        text_states: Tensor | None = None,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        *,
        text_ids: Tensor | None = None,
        given: Tensor | None = None,
        given_time: float | Tensor = 1.0,
        micro: Micro | None = None,
        keep: Tensor | None = None,
        reuse: BlockReuse | None = None,
    ) -> StivOutput:
        """Return the velocity of latents [B, T, C, h, w] at times t [B].

        Args:
            text_states, pooled: [B, m, e] and [B, e]. text_mask: bool [B, m], False at padding; None: no padding.
            text_ids: int64 [B, m], prompts for the small text encoder, in place of text_states and pooled.
            given: bool [B, T], the frames of the condition. They have the time `given_time` if the config says
                given_time "clean". The caller puts their latents into `latents`.
            given_time: a number, or [B]: the time of given frames.
            micro: None: the conditions of generated clips.
            keep: int64 [B, k], the places (tokens of a frame, ascending) that the main blocks see; None: all.
            reuse: memory of reuse between sampling steps; without gradients only.

        Raises UserError for sizes that are no multiple of the patch, ValueError for missing text.
        """
        config, (batch, frames, _, height, width) = self.config, latents.shape
        f, rows, columns = config.grid(frames, height, width)
        if text_ids is not None:
            if text_mask is None:
                text_mask = torch.ones_like(text_ids, dtype=torch.bool)
            text_states, text_mask, pooled = self.encode_text(text_ids, text_mask)
        if text_states is None or pooled is None:
            raise ValueError("text is missing: give text_states and pooled, or text_ids")
        dtype, device = self.patch_in.weight.dtype, latents.device
        micro = Micro.default(config, batch, frames, height, width, device) if micro is None else micro
        conditions = F.silu(self.conditions(self._times(t, given, given_time), micro, pooled))
        modulation = self.modulation(conditions).unflatten(-1, (6, -1))
        text = self.text_in(text_states.to(dtype))
        mask = None if text_mask is None else text_mask[:, None, None]
        angles = spatial_angles(rows, columns, config.position_scale["rows"], config.position_scale["columns"], HEAD_DIM, device)
        times = rotary(temporal_angles(f, config.position_scale["time"], HEAD_DIM, device), dtype)
        places = rotary(angles, dtype)
        x = patches(latents, config).to(dtype)
        blocks, late = list(self.blocks), []
        if keep is not None:
            at = keep[:, None, :, None]  # [B, 1, k, 1]
            x = x.gather(2, at.expand(-1, f, -1, x.shape[-1]))
            split = max(0, len(blocks) - config.unmasked_layers)
            blocks, late = blocks[:split], blocks[split:]
        kept_places = places if keep is None else rotary(angles[keep][:, None], dtype)  # [B, 1, k, 1, D]
        x = self._run(blocks, self.patch_in(x).to(dtype), (modulation, text, mask, kept_places, times), reuse)
        if keep is not None:
            empty = self.mask_token.to(x.dtype).expand(batch, f, rows * columns, -1)
            x = empty.scatter(2, at.expand(-1, f, -1, x.shape[-1]), x)
            x = self._run(late, x, (modulation, text, mask, places, times))
        shift, scale = self.final_modulation(conditions)[..., None, :].chunk(2, dim=-1)  # [B, f or 1, 1, d]
        out = unpatched(self.patch_out(normed_sum(shift, x, 1 + scale)).float(), rows, config)
        return StivOutput(sample=out if config.prediction == "velocity" else velocity_of_noise(latents.float(), out, t))

    def _times(self, t: Tensor, given: Tensor | None, given_time: float | Tensor) -> Tensor:
        """Return the time of each token frame, [B, f], or [B, 1] if all frames of a clip have the same."""
        if given is None or self.config.given_time == "same":
            return t[:, None]
        whole = given.unflatten(1, (-1, self.config.temporal_patch_size)).all(-1)  # [B, f]: all frames of the token are given
        return torch.where(whole, torch.as_tensor(given_time, dtype=t.dtype, device=t.device).reshape(-1, 1), t[:, None])

    def _run(self, blocks: list[Block], x: Tensor, with_: tuple, reuse: BlockReuse | None = None) -> Tensor:
        """Return x [B, f, s, d] after blocks. Blocks whose parts are all skipped do not run."""
        blocks = [block for block in blocks if not block.skipped.issuperset(PARTS)]
        if reuse is not None and not torch.is_grad_enabled() and len(blocks) > reuse.first + reuse.last:
            last = len(blocks) - reuse.last
            x = self._run(blocks[: reuse.first], x, with_)
            if reuse.may_skip(x):
                x = x + reuse.added
            else:
                before, x = x, self._run(blocks[reuse.first : last], x, with_)
                reuse.added = x - before
            return self._run(blocks[last:], x, with_)
        for block in blocks:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block, x, *with_)
            else:
                x = block(x, *with_)
        return x


AutoModel.register(StivConfig, StivForVideoGeneration)
