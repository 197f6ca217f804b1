"""An estimate of the memory and the FLOPs of a training step, by arithmetic alone.

Nothing is allocated: the model is built on the meta device, and sequences are layouts without ids. All
memory is in bytes of one process (one GPU).

Memory is estimated at five moments of a step. The estimate of the step is that of the moment with the most memory:

    start     every process holds the whole model in float32, before DeepSpeed shards it
    loss      all layers have saved what their backward pass needs, and the head computes its gradient
    backward  the backward pass of the last layer, which comes first and has the most activations
    first     the backward pass of the first layer, which comes last: its activations, and the gradients of the others
    update    all activations are freed, and all gradients exist

tests/planning/test_planning.py compares the estimate with the measured memory of real steps on a CPU.
tests/training/test_deepspeed.py compares it with the memory of two processes between steps in ZeRO 1 to 3.
Other memory of DeepSpeed, for example its buckets on a GPU, follows from its code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.flops import adapter_shapes, adapter_weights, layer_flops_per_token, training_flops
from lumos.models.lumos1.modeling import LumosForVideoGeneration
from lumos.models.lumos1.patterns import check_long_enough, given_share, share_of
from lumos.models.lumos1.sequence import Frame, SequenceLayout, num_latent_frames
from lumos.models.lumos1.swiglu import mlp_piece
from lumos.models.lumos1.training import check_clip_shape, model_config
from lumos.models.lumos1.training_settings import LumosTrainingSettings, MaskingSettings
from lumos.planning.fixed_memory import fixed_bytes, update_bytes
from lumos.planning.sharding import PARTS, Sharding
from lumos.runtime import parameter_count
from lumos.training.sections import LoraSettings


@dataclass(frozen=True)
class LumosTrainingCost:
    """The cost of training a decoder; `lumos.planning.cost.TrainingCost` describes the members.

    With `lora` only the adapters are trained; their parameters are part of `parameters`.
    """

    config: LumosConfig
    parameters: int
    lora: LoraSettings | None = None
    masking: MaskingSettings = field(default_factory=MaskingSettings)
    patterns: Mapping[str, float] = field(default_factory=lambda: {"none": 1.0})
    text_tokens: int = 0
    assumed: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: LumosConfig, lora: LoraSettings | None = None, **more: Any) -> LumosTrainingCost:
        """Return the cost for a config, with the parameters counted; `more` sets other fields."""
        adapters = adapter_weights(config, lora.rank, lora.targets) if lora else 0
        return cls(config, parameter_count(meta_model(config)) + adapters, lora, **more)

    @property
    def trained(self) -> int:
        return adapter_weights(self.config, self.lora.rank, self.lora.targets) if self.lora else self.parameters

    @property
    def is_tuned(self) -> bool:
        return self.lora is not None

    @property
    def matrices(self) -> int:
        return self.trained if self.lora else self.config.num_hidden_layers * sum(_shapes(self.config).values())

    @property
    def stacked(self) -> int:
        return self.trained if self.lora else self.config.num_hidden_layers * max(_shapes(self.config).values())

    @cached_property
    def trained_shapes(self) -> list[tuple[int, ...]]:
        if self.lora:
            return adapter_shapes(self.config, self.lora.rank, self.lora.targets)
        return [tuple(p.shape) for p in meta_model(self.config).parameters()]

    @property
    def largest_parameter(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    def cast_parameters(self, checkpointing: bool) -> int:
        if self.lora and checkpointing:
            return (self.parameters - 2 * self.largest_parameter) // self.config.num_hidden_layers
        return self.parameters - self.largest_parameter

    @property
    def size_unit(self) -> int:
        return self.config.pixels_per_size_unit

    def sequence(self, num_frames: int, height: int, width: int) -> SequenceLayout:
        """Return the layout of a clip: the longest, with a picture of the last frame if any clip has one."""
        t = num_latent_frames(num_frames, self.config.temporal_compression)
        has_last = t > 1 and share_of("ends", self.patterns) > 0
        return sequence_layout(self.config, self.text_tokens, t, height, width, has_last)

    def tokens(self, sequence: SequenceLayout) -> int:
        return sequence.length

    def codes(self, sequence: SequenceLayout) -> int:
        return code_count(sequence)

    def supervised(self, sequence: SequenceLayout) -> float:
        t, frame = sequence.num_latent_frames, sequence.frames[0]
        open_codes = (1 - given_share(self.patterns, t)) * t * frame.rows * frame.cols
        return mean_mask_ratio(self.masking, t) * open_codes

    def training_flops(self, sequence: SequenceLayout, supervised: float) -> float:
        """Return the expected FLOPs of a clip: some have the picture of the last frame that the layout has, and some do not."""
        adapters = self.trained if self.lora else None
        if len(sequence.frames) == sequence.num_latent_frames:
            return training_flops(self.config, sequence, supervised, adapters)
        share = share_of("ends", self.patterns)
        return share * training_flops(self.config, sequence, supervised, adapters) + (1 - share) * training_flops(
            self.config, without_last(sequence), supervised, adapters
        )

    def recomputed_flops(self, sequence: SequenceLayout) -> float:
        return sequence.length * layer_flops_per_token(self.config, 0)  # attention is not recomputed

    def memory_moments(self, sharding: Sharding, rows: int, sequence: SequenceLayout) -> dict[str, dict[str, int]]:
        return memory_moments(self, sharding, rows, sequence)


def _shapes(config: LumosConfig) -> Counter[tuple[int, int]]:
    """Return {(rows, columns): weights of all matrices of this shape in a layer}."""
    c, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    matrices = [(c, c), (c, c), (kv, c), (kv, c), (f, c), (f, c), (c, f)]
    counts: Counter[tuple[int, int]] = Counter()
    for rows, columns in matrices:
        counts[rows, columns] += rows * columns
    return counts


def meta_model(config: LumosConfig) -> LumosForVideoGeneration:
    """Return the model on the meta device, for its sizes."""
    with torch.device("meta"):
        return LumosForVideoGeneration(config)


def sequence_layout(
    config: LumosConfig, text_tokens: int, t: int, height: int, width: int, has_last: bool = False
) -> SequenceLayout:
    """Return the layout of `t` latent frames of height x width pixels after a prompt of `text_tokens` tokens.

    has_last: whether a picture of the last frame stands behind the first one, with the number of its time.
    """
    rows, cols = height // config.spatial_compression, width // config.spatial_compression
    frames, at = [], text_tokens + 5  # bos, sep, video_start, duration, fps
    for time in (None, t - 1, *[None] * (t - 1)) if has_last else [None] * t:
        frames.append(Frame(at + (time is not None), rows, cols, time))
        at = frames[-1].end
    return SequenceLayout(at + 2, tuple(frames))  # video_end, sep


def without_last(layout: SequenceLayout) -> SequenceLayout:
    """Return the layout of the same clip without the picture of its last frame."""
    first, last, *others = layout.frames
    shift = last.end - first.end
    return SequenceLayout(layout.length - shift, (first, *(replace(frame, start=frame.start - shift) for frame in others)))


def code_count(layout: SequenceLayout) -> int:
    """Return the number of codes in all frames of a layout."""
    return sum(frame.rows * frame.cols for frame in layout.frames)


def norm_bytes(config: LumosConfig, sharding: Sharding, is_frozen: bool = False) -> int:
    """Return the bytes that one RMSNorm saves for its backward pass, per token.

    On a GPU it saves its input. On a CPU there is no fused kernel: the input is saved in float32, and again
    divided by its rms, unless the weight is frozen and needs no gradient.
    """
    if sharding.on_gpu:
        return config.hidden_size * sharding.residual
    return config.hidden_size * 4 * (1 if is_frozen else 2)


def layer_bytes(config: LumosConfig, sharding: Sharding) -> int:
    """Return the bytes that one layer saves for its backward pass, per token.

    The terms follow the forward pass of `DecoderLayer`.
    """
    c, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    s = sharding.product
    norms = 2 * norm_bytes(config, sharding)
    normed = 2 * c * s  # inputs of q, k, v and of gate, up
    raw = (c + kv) * (4 if sharding.autocast and sharding.on_gpu else s)  # q, k before QK-norm; CUDA's autocast uses float32
    attention = (c + 2 * kv) * s  # rotated q and k, and v
    attention += 2 * c * s  # the output of each segment, and all of them joined as the input of o_proj
    statistics = 4 * (2 + 2 * (heads + kv_heads) + heads)  # of the norms, and the normalisers of the softmax
    gated = 3 * f * s  # gate, up, and the input of down_proj
    return norms + normed + raw + attention + statistics + gated


def adapter_bytes(config: LumosConfig, sharding: Sharding, lora: LoraSettings) -> int:
    """Return the bytes to add to `layer_bytes` for a layer with adapters; the number may be negative.

    A frozen matrix saves no input. Each adapter saves its own.
    """
    s = sharding.product
    more = 2 * (norm_bytes(config, sharding, is_frozen=True) - norm_bytes(config, sharding))
    for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        width = config.intermediate_size if names == ("down_proj",) else config.hidden_size
        adapted = sum(name in lora.targets for name in names)
        kept = adapted if sharding.autocast or lora.dropout else min(1, adapted)  # a cast or dropout makes inputs anew
        more += (kept - 1) * width * s
        more += adapted * lora.rank * s
        if lora.dropout:
            more += adapted * width * (1 if sharding.on_gpu else 4 if sharding.autocast else s)  # dropout masks: bytes, or factors
    return more


def checkpointed_bytes(config: LumosConfig, sharding: Sharding) -> int:
    """Return the bytes that one layer saves with activation checkpointing, per token: its input and the attention output."""
    return config.hidden_size * (sharding.residual + sharding.product) + 4 * config.num_attention_heads


def memory_moments(model: LumosTrainingCost, sharding: Sharding, rows: int, layout: SequenceLayout) -> dict[str, dict[str, int]]:
    """Return {moment: {part: bytes}} on the device of one process, for micro-batches of `rows` sequences.

    The moments are those of the module's docstring, the parts those of `lumos.planning.sharding.PARTS`.
    """
    config, lora, parameters = model.config, model.lora, model.parameters
    width, embedding = config.hidden_size, model.largest_parameter
    tokens, asked = rows * layout.length, rows * code_count(layout)
    compute, residual = sharding.product, sharding.residual
    stored = compute if sharding.stage else 4  # bytes of a weight

    fixed = dict.fromkeys(PARTS, 0) | fixed_bytes(model, sharding)
    all_gradients, fixed["gradients"] = fixed["gradients"], 0
    # At all times ZeRO-3 holds the gradients of its shard, and ZeRO-1 with bf16 weights those of all parameters.
    always = sharding.stage == 3 or (sharding.stage == 1 and sharding.half)
    earlier = all_gradients if sharding.accumulates or always else 0
    # Head and embedding are the largest parameters. The head gets its gradient first, the embedding last, and
    # every ZeRO stage allocates such a gradient whole before it is sharded.
    largest = 0 if lora else stored * embedding
    after = all_gradients + (largest if sharding.accumulates or sharding.stage else 0)

    per_layer, layers = tokens * layer_bytes(config, sharding), config.num_hidden_layers
    if lora:
        per_layer += tokens * adapter_bytes(config, sharding, lora)
    kept = layers * (tokens * checkpointed_bytes(config, sharding) if sharding.checkpointing else per_layer)
    kept += tokens * 2 * config.head_dim * stored  # rotary tables
    last_norm = tokens * norm_bytes(config, sharding, is_frozen=lora is not None)
    # In the backward pass of a layer the widest tensors are the gradients of gate, of up and of their product.
    # The gradient of the product takes the place of the input of down_proj, which is freed, if it was saved. In
    # addition there are the gradients of the residual stream before and after the layer.
    keeps_product = lora is None or "down_proj" in lora.targets
    piece = min(tokens, mlp_piece(tokens, with_gradients=True))
    gradients_of_layer = piece * (2 if keeps_product else 3) * config.intermediate_size * compute + tokens * 2 * width * residual
    again = per_layer - tokens * checkpointed_bytes(config, sharding) if sharding.checkpointing else 0

    chunk = min(config.loss_chunk_size, asked)
    # Casts to float32 and back. With several chunks, those of one chunk still exist when the next begins.
    casts = (6 if asked == chunk else 10) if sharding.half else 0
    logits = chunk * config.visual_token_count * (compute + 4 + casts)  # the matrix product, log p and casts
    logits += asked * width * 2 * compute + tokens * width * compute  # selected states, their gradient, all states
    if sharding.half and not lora:  # gradient of the visual rows in float32, and the part of one chunk in bf16
        logits += config.visual_token_count * width * (4 + 2)
    if sharding.autocast:  # the visual rows as bf16
        logits += config.visual_token_count * width * 2

    # Muon's updates, with copies of them and of their products, in bf16 on a GPU. The gradients of the updated matrices are freed.
    working = update_bytes(model, sharding.optimizer, muon=12 if sharding.on_gpu else 20)

    def at(**parts: int) -> dict[str, int]:
        return {part: fixed[part] + parts.get(part, 0) for part in PARTS}

    return {
        "start": dict.fromkeys(PARTS, 0) | {"weights": 4 * parameters},
        "loss": at(gradients=earlier + largest, activations=kept + last_norm, logits=logits),
        "backward": at(gradients=earlier + largest, activations=kept + gradients_of_layer + again),
        "first": at(gradients=all_gradients * (layers - 1) // layers, activations=per_layer + gradients_of_layer),
        "update": at(gradients=after, optimizer=working, activations=tokens * width * residual),
    }


def mean_mask_ratio(masking: MaskingSettings, t: int) -> float:
    """Return the mean mask ratio of a clip of `t` latent frames.

    It is the mean of max(min_ratio, cos(pi u / 2)) over u in [0, 1), for example 0.80 for min_ratio 0.7.
    With "tube_decay" the ratio grows linearly from there to 1 at the last frame.
    """
    turn = math.acos(masking.min_ratio) * 2 / math.pi
    mean = 2 / math.pi * math.sin(math.pi / 2 * turn) + (1 - turn) * masking.min_ratio
    return (mean + 1) / 2 if masking.kind == "tube_decay" and t > 1 else mean


def planned_config(settings: LumosTrainingSettings) -> tuple[LumosConfig, str | None]:
    """Return the config of the model, and a sentence about an assumption, or None.

    If the folder model.from does not exist yet, the model is assumed to have the sizes of model.preset.
    """
    model = settings.model
    if model.from_ is None or model.preset is None or (Path(model.from_) / "config.json").is_file():
        return model_config(model), None
    return model_config(replace(model, from_=None)), f"{model.from_}, which is not there yet, has the shape of {model.preset}"


def training_cost(settings: LumosTrainingSettings, text_tokens: int) -> LumosTrainingCost:
    """Return the cost of the training run of these settings. Raises UserError for settings that cannot work."""
    config, about_model = planned_config(settings)
    check_clip_shape(config, settings.data)
    num_frames = settings.data.num_frames
    check_long_enough(settings.patterns, num_latent_frames(num_frames, config.temporal_compression), num_frames)
    return LumosTrainingCost.of(
        config, settings.lora if settings.lora.rank else None, masking=settings.masking, patterns=settings.patterns,
        text_tokens=text_tokens,
        assumed=(about_model,) if about_model else (),
    )  # fmt: skip
