"""What a training run will need before it is paid for: tokens, FLOPs, time and memory, by arithmetic alone.

Nothing is allocated: the model is built on the meta device, sequences are layouts without ids. All memory is in bytes for
one process (one GPU), FLOPs are multiply-adds x 2, and a step is one optimizer step of all processes.

Memory is looked at in four moments of a step; the worst of them is the plan's answer, so its parts add up to its total:

    start     every process holds the whole model in float32 before DeepSpeed takes its share
    loss      all layers have kept what their backward pass needs, and the head makes its gradient
    backward  the last layer's backward pass, the widest place
    update    all activations are gone, all gradients are there

tests/test_planning.py holds this against the measured memory of real steps on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lumos.attention import allowed_pairs
from lumos.configuration import LumosConfig
from lumos.modeling import LumosForVideoGeneration
from lumos.sequence import Frame, Layout

GIB = 2**30
RESERVED = 2 * GIB
"""Of a GPU's memory, for the CUDA context, the communication library and what the allocator cannot fill."""

GPUS = {
    "3090": (24, 71), "4090": (24, 165), "l40s": (48, 362), "a100-40": (40, 312), "a100": (80, 312), "h20": (96, 148),
    "h100": (80, 989), "h200": (141, 989), "b200": (180, 2250),
}  # fmt: skip
"""Name -> (memory in GiB, peak TFLOP/s of bf16 matrix products without sparsity), from the makers' data sheets."""

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


@dataclass(frozen=True)
class Work:
    """The steps of one kind: `steps` of them, each of `clips` sequences over all processes.

    `layout` is the usual sequence, `longest` the one of the bucket with the most tokens; `mask_ratio` the mean share of the
    codes that are supervised.
    """

    kind: str
    steps: int
    clips: int
    layout: Layout
    longest: Layout
    mask_ratio: float

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.clips * self.layout.length


@dataclass(frozen=True)
class Spread:
    """How a run is spread. `stage` None: plain PyTorch on one device, else DeepSpeed's ZeRO stage over `world` processes.

    `bucket`, `live`: elements that DeepSpeed reduces at once, and that ZeRO-3 holds gathered. `half`: bf16. `on_gpu`: CUDA's
    fused kernels. `averaged`: with EMA. `accumulates`: a step has several micro-batches.
    """

    stage: int | None = None
    world: int = 1
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = 50_000_000
    live: int = 1_000_000_000
    half: bool = True
    on_gpu: bool = True
    averaged: bool = False
    accumulates: bool = False
    checkpointing: bool = True

    @property
    def autocast(self) -> bool:
        """bf16 products over float32 weights; from stage 1 on the weights themselves are bf16."""
        return self.half and not self.stage

    @property
    def name(self) -> str:
        if self.stage is None:
            return "no DeepSpeed"
        offloaded = [what for what, is_on in (("optimizer", self.offload_optimizer), ("weights", self.offload_weights)) if is_on]
        return f"ZeRO {self.stage}" + (f", {' and '.join(offloaded)} on CPU" if offloaded else "")


def meta_model(config: LumosConfig) -> LumosForVideoGeneration:
    """The model without weights, for its sizes."""
    with torch.device("meta"):
        return LumosForVideoGeneration(config)


def parameter_count(model: LumosForVideoGeneration) -> int:
    return sum(p.numel() for p in model.parameters())


def sequence_layout(config: LumosConfig, text_tokens: int, t: int, height: int, width: int) -> Layout:
    """The layout of `t` latent frames of height x width pixels behind a prompt of `text_tokens`: see lumos/sequence.py."""
    rows, cols = height // config.spatial_compression, width // config.spatial_compression
    frames, at = [], text_tokens + 5  # bos, sep, video_start, duration, fps
    for _ in range(t):
        frames.append(Frame(at, rows, cols))
        at = frames[-1].end
    return Layout(at + 2, tuple(frames))  # video_end, sep


def code_count(layout: Layout) -> int:
    return sum(frame.rows * frame.cols for frame in layout.frames)


def mean_mask_ratio(kind: str, min_ratio: float, t: int) -> float:
    """Mean of max(min_ratio, cos(pi u / 2)) over u in [0, 1): 0.80 for 0.7. Tube decay goes on to 1 at the last frame."""
    turn = math.acos(min_ratio) * 2 / math.pi
    mean = 2 / math.pi * math.sin(math.pi / 2 * turn) + (1 - turn) * min_ratio
    return (mean + 1) / 2 if kind == "tube_decay" and t > 1 else mean


def forward_flops(model: LumosForVideoGeneration, layout: Layout, supervised: float) -> int:
    """One sequence: the layers with frame-causal attention, and the head at `supervised` positions over the codes."""
    layers = layout.length * model.flops_per_token(allowed_pairs(layout) / layout.length)
    return round(layers + 2 * supervised * model.config.visual_token_count * model.config.hidden_size)


def step_flops(model: LumosForVideoGeneration, work: Work) -> int:
    """Forward and backward (twice a forward) of a step: what the method needs."""
    return 3 * work.clips * forward_flops(model, work.layout, work.mask_ratio * code_count(work.layout))


def repeated_flops(model: LumosForVideoGeneration, work: Work) -> int:
    """What activation checkpointing computes again: the layers without attention."""
    return work.clips * work.layout.length * model.flops_per_token(0)


def layer_bytes(config: LumosConfig, spread: Spread) -> int:
    """What one layer keeps for its backward pass, of one token; lumos/modeling.py from top to bottom."""
    c, f, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    s, residual = (2 if spread.half else 4), (2 if spread.half and not spread.autocast else 4)
    inputs = 2 * c * residual  # of the two norms
    inputs += 0 if spread.on_gpu else 2 * c * residual  # divided by their rms: the CPU has no fused RMSNorm
    normed = (5 if spread.autocast else 2) * c * s  # inputs of q, k, v and of gate, up: one, or a cast for each
    raw = (c + kv) * (4 if spread.autocast else s)  # q, k before their norm, which autocast computes in float32
    attention = (c + 2 * (kv if heads == kv_heads else c)) * s  # rotated q; k and v, repeated for their groups
    attention += 2 * c * s  # what it gives, by segment and joined for o_proj
    statistics = 4 * (2 + 2 * (heads + kv_heads) + heads)  # of the norms, and attention's normalisers
    return inputs + normed + raw + attention + statistics + 4 * f * s


def kept_bytes(config: LumosConfig, spread: Spread) -> int:
    """The same under activation checkpointing: a layer's input and what attention gave."""
    half = 2 if spread.half else 4
    return config.hidden_size * (half if not spread.autocast else 4) + config.hidden_size * half + 4 * config.num_attention_heads


def memory_moments(config: LumosConfig, spread: Spread, rows: int, layout: Layout) -> dict[str, dict[str, int]]:
    """Moment -> part -> bytes on the device of one process, for micro-batches of `rows` sequences."""
    model = meta_model(config)
    parameters, width = parameter_count(model), config.hidden_size
    embedding = config.vocab_size * width
    tokens, asked = rows * layout.length, rows * code_count(layout)
    compute = 2 if spread.half else 4
    stored = compute if spread.stage else 4  # bytes of a weight
    residual = 4 if spread.autocast else compute

    fixed = dict.fromkeys(PARTS, 0) | _states(parameters, embedding, spread)
    all_gradients, fixed["gradients"] = fixed["gradients"], 0
    earlier = all_gradients if spread.accumulates or spread.stage == 3 else 0  # ZeRO-3 always holds its share's
    largest = stored * embedding  # the head's gradient, made first, and the embedding's, made last: whole in every stage
    after = all_gradients + (largest if spread.accumulates or spread.stage else 0)

    per_layer, layers = tokens * layer_bytes(config, spread), config.num_hidden_layers
    kept = layers * (tokens * kept_bytes(config, spread) if spread.checkpointing else per_layer)
    outer = tokens * (width * (residual if spread.on_gpu else 2 * residual) + config.head_dim * stored)  # last norm, rotary tables
    widest = tokens * (2 * config.intermediate_size * compute + 2 * width * residual)  # gradients on their way
    widest += per_layer if spread.checkpointing else 0

    chunk = min(config.loss_chunk_size, asked)
    logits = chunk * config.visual_token_count * (compute + 4 + (6 if spread.half else 0))  # product, log p, and their casts
    logits += asked * width * 2 * compute + tokens * width * residual  # selected states, their gradient, all states
    if spread.half:  # gradient of the visual rows in float32, a chunk's share of it, and the rows cast
        logits += config.visual_token_count * width * (4 + 2 + (2 if spread.autocast else 0))

    def at(**parts: int) -> dict[str, int]:
        return {part: fixed[part] + parts.get(part, 0) for part in PARTS}

    return {
        "start": dict.fromkeys(PARTS, 0) | {"weights": 4 * parameters},
        "loss": at(gradients=earlier + largest, activations=kept + outer, logits=logits),
        "backward": at(gradients=earlier + largest, activations=kept + outer + widest),
        "update": at(gradients=after, activations=tokens * width * residual),
    }


def _states(parameters: int, embedding: int, spread: Spread) -> dict[str, int]:
    """Bytes on the device that do not depend on the batch: weights, all gradients, optimizer, buffers."""
    share = math.ceil(parameters / spread.world)
    stage = spread.stage or 0
    own = share if stage >= 3 else parameters
    averaged = 4 * own if spread.averaged else 0
    if stage == 0:
        cast = 2 * (parameters - embedding) if spread.autocast else 0  # autocast keeps bf16 copies of the matrices for a step
        return {"weights": 4 * parameters + cast, "gradients": 4 * parameters, "optimizer": 8 * parameters + averaged, "buffers": 0}
    compute = 2 if spread.half else 4
    # Reduced in float32, in buckets; a gradient larger than a bucket (embedding, head) is reduced alone.
    largest = max(embedding, min(spread.bucket, parameters))
    buffers = 4 * largest + 2 * 4 * min(spread.bucket, parameters)
    if stage == 1:
        gradients = 4 * parameters + 4 * share  # whole, and this process's share for the optimizer
    elif stage == 2:
        gradients = compute * share + 4 * share
    else:
        gradients = 4 * share + 4 * share
        buffers += compute * min(parameters, spread.live)  # gathered weights
    on_device = 0 if spread.offload_optimizer else 1
    return {
        "weights": compute * (0 if spread.offload_weights else own),
        "gradients": gradients if on_device or stage == 1 else compute * share,
        "optimizer": on_device * 12 * share + averaged,  # float32 weights, two moments
        "buffers": buffers,
    }
