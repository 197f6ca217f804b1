"""The cost of training STIV and of its clips, by arithmetic alone: the model is built on the meta device, if at all.

Memory is in bytes of one process (one GPU), at four moments of a step:

    start     every process holds the whole model in float32, before DeepSpeed shards it
    backward  the backward pass of the last block, which comes first: all activations, and gradients of the residual stream
    first     the backward pass of the first block, which comes last: its activations, and the gradients of the others
    update    all activations are freed, and all gradients exist
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lumos.errors import UserError
from lumos.models.stiv.activations import ClipTokens, activation_bytes, block_bytes, checkpointed_bytes
from lumos.models.stiv.block_reuse import BlockReuse
from lumos.models.stiv.configuration import CAUSAL_LATENTS, StivConfig
from lumos.models.stiv.flops import block_flops, blocks_of, ends_flops, forward_flops, text_encoder_flops
from lumos.models.stiv.flow import time_grid
from lumos.models.stiv.loading import read_config
from lumos.models.stiv.modeling import StivForVideoGeneration
from lumos.models.stiv.passes import SamplingPass, passes_of
from lumos.models.stiv.patterns import given_frames
from lumos.models.stiv.pipeline import USUAL_CLIP, guidance_of
from lumos.models.stiv.planned_config import check_clips, grid_of, planned_config
from lumos.models.stiv.request import LARGEST_SIDE, longest_pass
from lumos.models.stiv.settings import StivOptions
from lumos.models.stiv.solvers import call_times
from lumos.models.stiv.training_settings import StivTrainingSettings
from lumos.pipeline.defaults import ClipDefaults, read_defaults
from lumos.pipeline.inputs import without_effect
from lumos.pipeline.request import check_side
from lumos.planning.fixed_memory import fixed_bytes, update_bytes
from lumos.planning.sharding import PARTS, Sharding
from lumos.runtime import parameter_count
from lumos.training.sections import LoraSettings

RUNNING_TENSORS = 14
"""Tensors [tokens, hidden_size] that exist at once in a block without gradients, most of them in the MLP."""


@dataclass(frozen=True)
class StivTrainingCost:
    """The cost of training the transformer; `lumos.planning.cost.TrainingCost` describes the members."""

    config: StivConfig
    settings: StivTrainingSettings
    text_tokens: int = 16
    assumed: tuple[str, ...] = ()

    @cached_property
    def _model(self) -> StivForVideoGeneration:
        return meta_model(self.config)

    @property
    def lora(self) -> LoraSettings | None:
        return self.settings.lora if self.settings.lora.rank else None

    @cached_property
    def trained_shapes(self) -> list[tuple[int, ...]]:
        if self.lora is None:
            return [tuple(p.shape) for p in self._model.parameters()]
        linear = [module for name, module in self._model.named_modules()
                  if isinstance(module, nn.Linear) and name.split(".")[-1] in self.lora.targets]  # fmt: skip
        rank = self.lora.rank
        return [shape for m in linear for shape in ((rank, m.in_features), (m.out_features, rank))]

    @cached_property
    def adapters(self) -> int:
        """The number of weights of the adapters."""
        return sum(map(math.prod, self.trained_shapes)) if self.lora else 0

    @cached_property
    def parameters(self) -> int:
        return parameter_count(self._model) + self.adapters

    @property
    def trained(self) -> int:
        return self.adapters if self.lora else self.parameters

    @property
    def is_tuned(self) -> bool:
        return self.lora is not None

    @cached_property
    def _shapes(self) -> Counter[tuple[int, ...]]:
        """The numbers of weights in the matrices that Muon updates, by shape."""
        counts: Counter[tuple[int, ...]] = Counter()
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Linear) and "blocks." in name:
                counts[tuple(module.weight.shape)] += module.weight.numel()
        return counts

    @property
    def matrices(self) -> int:
        return self.trained if self.lora else sum(self._shapes.values())

    @property
    def stacked(self) -> int:
        return self.trained if self.lora else max(self._shapes.values())

    @cached_property
    def largest_parameter(self) -> int:
        return max(p.numel() for p in self._model.parameters())

    def cast_parameters(self, checkpointing: bool) -> int:
        linear = sum(m.weight.numel() for m in self._model.modules() if isinstance(m, nn.Linear))
        return linear // self.config.num_hidden_layers if self.lora and checkpointing else linear

    @property
    def size_unit(self) -> int:
        return self.config.spatial_compression * self.config.patch_size

    def sequence(self, num_frames: int, height: int, width: int) -> ClipTokens:
        return clip_tokens(self.config, num_frames, height, width, self.text_tokens)

    def tokens(self, sequence: ClipTokens) -> int:
        return sequence.tokens + sequence.text

    def codes(self, sequence: ClipTokens) -> int:
        frames, rows, columns = sequence.latents
        return frames * rows * columns

    def supervised(self, sequence: ClipTokens) -> float:
        """Return the mean number of latent frames that have a loss."""
        frames, settings = sequence.latents[0], self.settings
        if frames == 1:
            return 1.0
        total, dropped = sum(settings.patterns.values()), settings.dropout
        kept = (1 - dropped.image) * (1 - dropped.joint)
        given = sum(share / total * len(given_frames(name, frames, self.config.latents))
                    for name, share in settings.patterns.items() if share > 0)  # fmt: skip
        return frames - kept * given

    def training_flops(self, sequence: ClipTokens, supervised: float) -> float:
        forward = forward_flops(self.config, *sequence.grid, sequence.text, self.settings.mask_ratio)
        forward += text_encoder_flops(self.config, sequence.text)
        if self.lora is None:
            return 3.0 * forward
        return 2.0 * forward + 6.0 * sequence.tokens * self.adapters  # frozen matrices need no gradient of their own

    def recomputed_flops(self, sequence: ClipTokens) -> float:
        config, (frames, rows, columns) = self.config, sequence.grid
        width, saves_products = config.hidden_size, self.settings.saved_outputs == "products"

        def of_block(places: int, parts: Collection[str]) -> float:
            tokens = frames * places
            if saves_products:  # the first layer of the MLP, and cross-attention
                of_token = 2 * config.mlp_ratio * width**2 * ("mlp" in parts) + 4 * width * sequence.text * ("cross" in parts)
                return tokens * of_token
            kept = 4 * width * tokens * (places + frames * ("temporal" in parts))  # self-attention, whose outputs are saved
            return block_flops(config, frames, places, sequence.text, parts) - kept

        return float(sum(of_block(*block) for block in blocks_of(config, rows * columns, self.settings.mask_ratio)))

    def memory_moments(self, sharding: Sharding, rows: int, sequence: ClipTokens) -> dict[str, dict[str, int]]:
        fixed = dict.fromkeys(PARTS, 0) | fixed_bytes(self, sharding)
        gradients, fixed["gradients"] = fixed["gradients"], 0
        always = sharding.stage == 3 or (sharding.stage == 1 and sharding.half)
        earlier = gradients if sharding.accumulates or always else 0
        working = update_bytes(self, sharding.optimizer, muon=14 if sharding.on_gpu else 24)  # of square matrices

        def at(**parts: int) -> dict[str, int]:
            return {part: fixed[part] + parts.get(part, 0) for part in PARTS}

        settings, given = self.settings, self._has_given(sequence)
        activations = activation_bytes(
            self.config, settings.mask_ratio, sharding, rows, sequence, given, settings.saved_outputs
        )
        # Gradients within a block take the place of the activations that their operators free, except of two of the residual
        # stream, and of three copies in float32 around the norms in mixed precision on a CPU.
        copies = 3 if sharding.half and not sharding.on_gpu else 0
        stream = (2 + copies) * rows * sequence.tokens * self.config.hidden_size * sharding.residual
        parts, places = self.config.parts_of(self.config.num_hidden_layers - 1), sequence.grid[1] * sequence.grid[2]
        block = block_bytes(self.config, sharding, rows, sequence, places, parts)
        again = 0  # what is computed again: all that the block saves, except of what checkpointing has saved
        if sharding.checkpointing:
            again = block - rows * sequence.tokens * checkpointed_bytes(self.config, sharding, settings.saved_outputs, parts)
        others = gradients * (self.config.num_hidden_layers - 1) // self.config.num_hidden_layers  # of all blocks but the first
        largest = 0 if self.lora else (sharding.product if sharding.stage else 4) * self.largest_parameter
        return {
            "start": dict.fromkeys(PARTS, 0) | {"weights": 4 * self.parameters},
            "backward": at(gradients=earlier + largest, activations=activations + stream + again),
            "first": at(gradients=others, activations=block + stream),
            "update": at(gradients=gradients + (largest if sharding.accumulates or sharding.stage else 0), optimizer=working),
        }

    def _has_given(self, sequence: ClipTokens) -> bool:
        named = any(share > 0 and name != "none" for name, share in self.settings.patterns.items())
        return named and sequence.latents[0] > 1 and self.config.given_time == "clean"


def meta_model(config: StivConfig) -> StivForVideoGeneration:
    """Return the model on the meta device, for its sizes."""
    with torch.device("meta"):
        return StivForVideoGeneration(config)


def clip_tokens(config: StivConfig, num_frames: int, height: int, width: int, text_tokens: int) -> ClipTokens:
    """Return the tokens of a clip. Raises UserError for sizes that the model cannot have."""
    grid = grid_of(config, num_frames, height, width)
    latents = (config.latent_frames(num_frames), height // config.spatial_compression, width // config.spatial_compression)
    return ClipTokens(latents, (grid["time"], grid["rows"], grid["columns"]), text_tokens)


def training_cost(settings: StivTrainingSettings, text_tokens: int) -> StivTrainingCost:
    """Return the cost of the training run of these settings. Raises UserError for settings that cannot work."""
    config, about_model = planned_config(settings)
    check_clips(config, settings)
    frozen = "the frozen text encoder is not counted" if config.text_encoder == "folder" else None
    if config.text_encoder == "small" and text_tokens >= config.max_prompt_tokens:
        raise UserError(f"a prompt of {text_tokens} tokens is too long; this model reads {config.max_prompt_tokens - 1}")
    return StivTrainingCost(config, settings, text_tokens, tuple(said for said in (about_model, frozen) if said))


# ---- clips

@dataclass(frozen=True)
class StivClipCost:
    """The cost of one clip from a prompt of `text_tokens` tokens, without the networks of latents and of a frozen text encoder.

    With image_guidance_scale it is a clip with given frames, since other clips cannot have this option.

    Raises UserError for a clip that the pipeline would refuse.
    """

    config: StivConfig
    clip: ClipDefaults
    settings: StivOptions
    text_tokens: int
    dtype: torch.dtype
    clips: int = 1
    passes: tuple[SamplingPass, ...] = field(init=False)

    def __post_init__(self) -> None:
        config, clip = self.config, self.clip
        for name in ("height", "width"):
            check_side(getattr(clip, name), name, config.spatial_compression * config.patch_size, LARGEST_SIDE)
        frames, longest = config.latent_frames(clip.num_frames), longest_pass(config, clip)
        if config.latents in CAUSAL_LATENTS and frames > longest:
            raise UserError(
                f"num_frames {clip.num_frames} is more than the {config.pixel_frames(longest)} that this model makes at once"
            )
        if self.text_tokens >= config.max_prompt_tokens:
            raise UserError(f"a prompt of {self.text_tokens} tokens is too long; this model reads {config.max_prompt_tokens - 1}")
        object.__setattr__(self, "passes", tuple(passes_of(frames, (), longest, self.settings.keyframe_stride)))

    def warn_of_effects(self, given: Mapping[str, Any]) -> None:
        """Warn of a keyframe_stride without keyframes; other options without effect are errors of `StivOptions`."""
        if len(self.passes) == 1:
            without_effect("a clip that is made at once", keyframe_stride=given.get("keyframe_stride"))

    @cached_property
    def calls(self) -> Counter[tuple[int, bool]]:
        """The runs of the network in a pass, counted by their rows and by whether the middle blocks run."""
        options, counts = self.settings, Counter()
        guidance, reuse = guidance_of(options, True, self.config), BlockReuse(options.block_reuse)
        for t in call_times(options.solver, time_grid(options.num_inference_steps, options.shift)):
            rows = torch.empty(len(guidance.branches(t)), device="meta")
            is_whole = not reuse.may_skip(rows)
            reuse.added = rows if is_whole else reuse.added
            counts[len(rows), is_whole] += 1
        return counts

    @property
    def branches(self) -> int:
        """The most rows of the network for one clip."""
        return max(rows for rows, _ in self.calls)

    def _of_pass(self, part: SamplingPass) -> ClipTokens:
        config, frames = self.config, len(part.frames)
        return clip_tokens(config, config.pixel_frames(frames), self.clip.height, self.clip.width, self.text_tokens + 1)

    def report(self, peak: float, utilisation: float) -> dict[str, Any]:
        """Return the cost as plain JSON values; see `lumos.planning.cost.ClipCost`."""
        config, options, flops = self.config, self.settings, {"layers": 0.0, "ends": 0.0, "text": 0.0}
        for part in self.passes:
            frames, rows, columns = (sequence := self._of_pass(part)).grid
            places = rows * columns
            each = [block_flops(config, frames, places, sequence.text, config.parts_of(i)) for i in range(config.num_hidden_layers)]
            ends = sum(each) if len(each) < 3 else each[0] + each[-1]  # the blocks that reuse does not skip
            for (branches, is_whole), count in self.calls.items():
                flops["layers"] += count * branches * (sum(each) if is_whole else ends)
                flops["ends"] += count * branches * ends_flops(config, frames, places, places, sequence.text)
        flops["text"] += 2 * text_encoder_flops(config, self.text_tokens + 1)
        total, parameters = sum(flops.values()), parameter_count(meta_model(config))
        longest = max((self._of_pass(part) for part in self.passes), key=lambda sequence: sequence.tokens)
        frames, rows, columns = longest.latents
        return {
            "parameters": parameters, "clip": vars(self.clip), "latent_frames": config.latent_frames(self.clip.num_frames),
            "codes_of_a_frame": rows * columns, "rows": self.branches, "tokens": longest.tokens,
            "steps": options.num_inference_steps * len(self.passes), "may_end_early": False, "flops": {**flops, "total": total},
            "bytes": {"weights": parameters * self.dtype.itemsize, "activations": self.activation_bytes},
            "peak": peak, "utilisation": utilisation, "seconds": total / (peak * utilisation),
        }  # fmt: skip

    @property
    def activation_bytes(self) -> int:
        """Bytes of the widest tensors of a block and of the latents, of all clips that are made at once."""
        longest = max((self._of_pass(part) for part in self.passes), key=lambda sequence: sequence.tokens)
        frames, rows, columns = longest.latents
        latents = 4 * self.config.latent_channels * frames * rows * columns * (2 + 2 * self.branches)
        tokens = self.branches * longest.tokens
        return self.clips * (tokens * self.config.hidden_size * RUNNING_TENSORS * self.dtype.itemsize + latents)


def clip_cost(
    config: StivConfig, clip: ClipDefaults, sampling: StivOptions, text_tokens: int, dtype: torch.dtype
) -> StivClipCost:
    """Return the cost of one clip from text alone. Raises UserError for a clip that the pipeline would refuse."""
    return StivClipCost(config, clip, sampling.for_text_alone(), text_tokens, dtype)


def model_of(folder: str | Path | None, preset: str | None) -> tuple[StivConfig, StivOptions, ClipDefaults]:
    """Return the config and the defaults of a model folder, or of a preset. No weights are read.

    A config that does not know the clips of its training gets the grid of the usual clip, as the pipeline takes that clip for
    the longest that the model makes at once.
    """
    if preset is not None:
        config, options, clip = StivConfig.preset(preset), StivOptions(), USUAL_CLIP
    else:
        config, (options, clip) = read_config(Path(folder)), read_defaults(Path(folder), StivOptions, USUAL_CLIP)
    if config.trained_grid is None:
        grid = grid_of(config, clip.num_frames, clip.height, clip.width)
        config = StivConfig(**config.to_dict() | {"trained_grid": grid})
    return config, options, clip


def out_of_memory_advice(
    config: StivConfig, clip: ClipDefaults, sampling: StivOptions, text_tokens: int, dtype: torch.dtype, clips: int = 1
) -> str:
    """Return a sentence for a clip that ran out of memory: the bytes that it needs, and settings that need fewer."""
    plan = StivClipCost(config, clip, sampling, text_tokens, dtype, clips)
    weights, unit = parameter_count(meta_model(config)), config.spatial_compression * config.patch_size
    changes: list[tuple[str, StivClipCost]] = []
    if clips > 1:
        changes.append((f"--batch-size {clips // 2}", replace_cost(plan, clips=clips // 2)))
    if dtype.itemsize > 2:
        changes.append(("--dtype bfloat16", replace_cost(plan, dtype=torch.bfloat16)))
    if sampling.is_guided:
        changes.append(("--guidance-scale 1", replace_cost(plan, settings=sampling.changed(guidance_scale=1.0))))
    height, width = (max(unit, side // 2 // unit * unit) for side in (clip.height, clip.width))
    if (height, width) != (clip.height, clip.width):
        smaller = replace(clip, height=height, width=width)
        changes.append((f"--height {height} --width {width}", replace_cost(plan, clip=smaller)))
    needs = {flags: weights * other.dtype.itemsize + other.activation_bytes for flags, other in changes}
    less = "; ".join(f"{flags} needs {in_units(size)}" for flags, size in needs.items())
    return (
        f"weights need {in_units(weights * dtype.itemsize)} and the activations of a step {in_units(plan.activation_bytes)}: "
        f"{less}; `python -m lumos plan --generate` counts other settings"
    )


def replace_cost(plan: StivClipCost, **changes: Any) -> StivClipCost:
    values = {name: getattr(plan, name) for name in ("config", "clip", "settings", "text_tokens", "dtype", "clips")}
    return StivClipCost(**values | changes)


def in_units(size: int) -> str:
    """Return a number of bytes as text in MiB or GiB."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
