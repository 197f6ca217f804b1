"""Benchmark of a training step of the decoder (forward, backward, AdamW) in three forms, two of them in two ways.

    lumos      as `train.py` runs it with activation_checkpointing: attention by frames, loss of the
               supervised positions over the codes only; each layer stores its input and attention output
    published  the published method, written plainly by us after the release (arXiv 2507.08801, its training
               code), not the release itself: a dense floating-point mask [L, L], logits of all positions over
               the whole vocabulary. As in the release's scripts, each layer stores its input and recomputes
               the rest
    llama      transformers' LlamaForCausalLM with the same layers, heads, widths and length, for
               comparison: a causal mask without a mask tensor, a next-token loss at all L - 1 positions,
               without activation checkpointing. Its vocabulary has the size of the codes, so that both losses
               have the same number of classes; its embedding and head therefore have fewer rows than ours

`<form>_without_checkpointing` is lumos or published without activation checkpointing: nothing is recomputed.
Ratios compare like with like. All of these share one model. Their losses and all gradients must agree. AdamW runs with a learning
rate of 0: it does all of its work, but the weights stay the same for the next repetition. A sequence
consists of as many whole frames as fit, with a prompt before them. `mask_ratio` of the content of each
frame is masked in a tube; the default is the mean of the published schedule.

Times are the fastest of the interleaved repetitions. The memory of a form is the peak of one step in a new
process, without the memory in use before it (weights, the two moments of AdamW, ids). It contains the
gradients of all weights, which all forms need. "Beyond gradients" leaves them out, "with optimizer" adds
the moments. FLOPs are those that the method needs: three times the forward pass, without recomputation;
for published, the FLOPs of lumos count. On a CPU all forms run with `return_freed_memory`, as `train.py`
does with activation_checkpointing, so that a form holds only the memory that its tensors need.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lumos.benchmarks.isolated import run_isolated
from lumos.benchmarks.measure import MB, Bench, Report, Step, extra_peak_bytes, interleaved, ratio, rounded, shown, with_optimizer
from lumos.errors import UserError
from lumos.models.lumos1.attention import dense_mask, expand_heads
from lumos.models.lumos1.benchmarks.arguments import PLAIN
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.flops import layer_flops_per_token, training_flops
from lumos.models.lumos1.masking import mask_count, pattern
from lumos.models.lumos1.modeling import LumosForVideoGeneration
from lumos.models.lumos1.rope import position_ids
from lumos.models.lumos1.sequence import build_sequence, code_mask, content_mask, parse_layout
from lumos.models.lumos1.training_cost import meta_model, sequence_layout
from lumos.runtime import check_memory, parameter_count, pick_device, return_freed_memory

KEPT = "_without_checkpointing"
FORMS = ("lumos", "published", f"lumos{KEPT}", f"published{KEPT}", "llama")
NAMES = {
    form: form.replace("published", PLAIN).replace(KEPT, ", without checkpointing").replace("llama", "Llama of transformers")
    for form in FORMS
}
"""The names of the forms in tables."""
HEAD_DIM = 64
WARM_UP = {"tokens": 64, "frame_height": 32, "frame_width": 32, "channels": 64, "layers": 1, "text_ids": 9100, "codes": 64}


@dataclass(frozen=True)
class TrainingBenchmarkSettings:
    """The settings of the training benchmark.

    tokens       length L of the sequence; a step has one sequence
    channels     hidden size
    text_ids     rows of the vocabulary before the visual codes
    codes        visual codes, the last rows of the vocabulary
    mask_ratio   share of each frame's content that is masked

    As in the 0.5b preset, heads have 64 channels, four heads share keys and values, and the MLP is four times
    as wide as the hidden size.
    """

    tokens: int
    frame_height: int
    frame_width: int
    channels: int
    layers: int
    text_ids: int
    codes: int
    mask_ratio: float


MAX_TOKENS = 2**24


def settings_from(args: argparse.Namespace) -> TrainingBenchmarkSettings:
    if min(args.channels, args.layers) < 1 or args.channels % HEAD_DIM:
        raise UserError(f"--channels {args.channels} --layers {args.layers} is not allowed; give a multiple of {HEAD_DIM}, and 1")
    if not 1 <= args.tokens <= MAX_TOKENS:
        raise UserError(f"--tokens {shown(args.tokens)} is not allowed; give 1 to {MAX_TOKENS:,}")
    if not 0 < args.mask_ratio <= 1:
        raise UserError(f"--mask-ratio {args.mask_ratio} is not allowed; give more than 0, at most 1")
    settings = TrainingBenchmarkSettings(
        args.tokens, args.frame_height, args.frame_width, args.channels, args.layers, args.text_ids, args.codes, args.mask_ratio
    )
    try:
        config = config_of(settings)
    except ValueError as error:
        raise UserError(f"--text-ids {args.text_ids} --codes {args.codes} --channels {args.channels}: {error}") from error
    clip_of(config, settings)
    if pick_device(args.device).type == "cpu":
        what = f"the published form at --tokens {args.tokens} --layers {args.layers} --codes {args.codes}"
        check_memory(memory_needed(settings), what)
    return settings


def steps(settings: TrainingBenchmarkSettings, bench: Bench) -> int:
    return len(FORMS) * (1 + bench.repetitions)


def config_of(settings: TrainingBenchmarkSettings) -> LumosConfig:
    heads = settings.channels // HEAD_DIM
    return LumosConfig(
        vocab_size=settings.text_ids + settings.codes, visual_token_start=settings.text_ids, visual_token_count=settings.codes,
        hidden_size=settings.channels, intermediate_size=4 * settings.channels, num_hidden_layers=settings.layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
    )  # fmt: skip


def llama_config(config: LumosConfig, tokens: int) -> LlamaConfig:
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    sizes = {name: getattr(config, name) for name in same}
    return LlamaConfig(vocab_size=config.visual_token_count, max_position_embeddings=tokens, attn_implementation="sdpa", **sizes)


def clip_of(config: LumosConfig, settings: TrainingBenchmarkSettings) -> tuple[int, int]:
    """Return (text tokens, latent frames) of the sequence, with as many frames as fit. Raises UserError if none fits."""
    height, width = settings.frame_height, settings.frame_width
    unit = config.pixels_per_size_unit
    if min(height, width) < unit or height % unit or width % unit:
        raise UserError(f"--frame-height {height} --frame-width {width} is not allowed; give multiples of {unit}")
    none, one = (sequence_layout(config, 0, t, height, width).length for t in (0, 1))
    if settings.tokens < one:
        raise UserError(f"--tokens {settings.tokens} holds no frame of {width}x{height} pixels; give at least {one}")
    frames, text = divmod(settings.tokens - none, one - none)
    return text, frames


def memory_needed(settings: TrainingBenchmarkSettings) -> int:
    """Return a rough estimate of the memory of the timed part in bytes.

    It counts the weights, gradients and moments of lumos and llama, and the activations of published. As
    measured on a CPU, published without checkpointing holds the logits of all positions and their gradient, and three times the
    logits of the supervised positions over the codes.
    """
    rows, c = settings.text_ids + settings.codes, settings.channels
    weights = 2 * (rows + settings.codes) * c + 2 * 15 * c**2 * settings.layers
    logits = settings.tokens * (2 * rows + 3 * settings.codes)
    kept = settings.tokens * settings.layers * 30 * c
    return 4 * (4 * weights + logits + kept + 3 * settings.tokens**2)


def batch(config: LumosConfig, settings: TrainingBenchmarkSettings) -> tuple[Tensor, Tensor]:
    """Return (ids, targets), each [1, L], of random text and codes.

    `mask_ratio` of the content of each frame is masked, in the same pattern in all frames. Targets are -100
    at positions without a loss.
    """
    generator = torch.Generator().manual_seed(0)
    text, t = clip_of(config, settings)
    grid = (t, settings.frame_height // config.spatial_compression, settings.frame_width // config.spatial_compression)
    words = torch.randint(config.video_end_token_id + 1, config.visual_token_start, (text,), generator=generator).tolist()
    codes = torch.randint(config.visual_token_count, grid, generator=generator)
    ids = build_sequence(words, codes, fps=12, duration=2, config=config)[None]
    layouts = parse_layout(ids, config)
    content = layouts[0].frames[0].content_length
    tube = pattern(content, mask_count(content, settings.mask_ratio), generator)
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[content_mask(layouts, ids.shape[1])] = tube.repeat(t)
    asked = hidden & code_mask(layouts, ids.shape[1])
    return ids.masked_fill(hidden, config.mask_token_id), torch.where(asked, ids - config.visual_token_start, -100)


def lumos_loss(model: LumosForVideoGeneration, ids: Tensor, targets: Tensor, checkpointing: bool = True) -> Tensor:
    model.model.gradient_checkpointing, model.config.attention = checkpointing, "segmented"
    return model(ids, targets=targets).loss


def published_loss(model: LumosForVideoGeneration, ids: Tensor, targets: Tensor, checkpointing: bool = True) -> Tensor:
    """Return the same loss as `lumos_loss`, computed plainly: one mask [L, L] for all layers, logits [L, V].

    With checkpointing, a layer recomputes all of itself, its attention too.
    """
    model.model.gradient_checkpointing, model.config.attention = checkpointing, "dense"
    layouts, length = model.layouts(ids), ids.shape[1]
    allowed = dense_mask(layouts, length).to(ids.device)[:, None]
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=ids.device).masked_fill_(~allowed, -torch.inf)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (expand_heads(x, q.shape[1] // x.shape[1]) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    rotary = model.rotary(position_ids(layouts, length, model.config), content_mask(layouts, length))
    logits = F.linear(model.model(ids, rotary, attend), model.lm_head.weight).float()
    asked = targets >= 0
    return F.cross_entropy(logits[..., model.config.visual_token_start :][asked], targets[asked])


def llama_loss(model: LlamaForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    ids = ids % model.config.vocab_size
    return model(input_ids=ids, labels=ids, use_cache=False).loss


LOSSES = {
    "lumos": lumos_loss, "published": published_loss, "llama": llama_loss,
    f"lumos{KEPT}": partial(lumos_loss, checkpointing=False), f"published{KEPT}": partial(published_loss, checkpointing=False),
}  # fmt: skip


def step_of(form: str, model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, targets: Tensor) -> Step:
    """Return a training step, which returns the loss and all gradients.

    For llama it returns an empty tuple, because no other form gives the same values.
    """

    def step() -> tuple:
        optimizer.zero_grad(set_to_none=True)
        loss = LOSSES[form](model, ids, targets)
        loss.backward()
        optimizer.step()
        return () if form == "llama" else (loss.detach(), *(p.grad for p in model.parameters()))

    return step


def prepare(form: str, device: str, dtype: str, **settings: Any) -> Step:
    """Make the model of one form and return its step. The memory benchmark calls it."""
    given = TrainingBenchmarkSettings(**settings)
    config = config_of(given)
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(config, given.tokens)) if form == "llama" else LumosForVideoGeneration(config)
    ids, targets = (x.to(device) for x in batch(config, given))
    return step_of(form, *with_optimizer(model, device, dtype), ids, targets)


def extra_memory(**arguments: Any) -> int:
    """Return the peak memory of a step in bytes without weights, moments and ids. Call it in a new process."""
    return_freed_memory(torch.device(arguments["device"]))
    return extra_peak_bytes(prepare, arguments, WARM_UP)


def run(settings: TrainingBenchmarkSettings, bench: Bench) -> Report:
    config = config_of(settings)
    call = {**asdict(settings), **bench.place}
    memory = {}
    for form in FORMS:
        what = f"a training step of {form} at {settings.tokens} tokens"
        memory[form] = run_isolated(__name__, "extra_memory", {"form": form, **call}, threads=bench.threads, what=what)
        bench.step()
    seconds, difference, supervised = timed_forms(config, settings, bench)

    meta = meta_model(config)
    with torch.device("meta"):
        llama = LlamaForCausalLM(llama_config(config, settings.tokens))
    itemsize = getattr(torch, bench.dtype).itemsize
    weights = {form: parameter_count(llama if form == "llama" else meta) * itemsize for form in FORMS}
    text, t = clip_of(config, settings)
    layout = sequence_layout(config, text, t, settings.frame_height, settings.frame_width)
    ours = training_flops(config, layout, supervised)
    length = settings.tokens
    causal = 3 * length * (layer_flops_per_token(config, (length + 1) / 2) + 2 * settings.codes * settings.channels)

    table = [["form", "tokens/s", "seconds", "time x", "extra MB", "memory x", "beyond gradients MB", "memory x", "peak share"]]
    row: dict[str, Any] = {
        "frames": t, "text_tokens": text, "supervised": supervised, "max_difference": rounded(difference),
        "gflops_needed": {"lumos": rounded(ours / 1e9), "llama": rounded(causal / 1e9)},
    }  # fmt: skip
    beyond = {form: memory[form] - weights[form] for form in FORMS}
    for form in FORMS:
        share = (causal if form == "llama" else ours) / seconds[form] / 1e9 / bench.peak_gflops[bench.dtype]
        row[form] = {
            "seconds": rounded(seconds[form]), "tokens_per_second": rounded(length / seconds[form]),
            "share_of_peak": rounded(share), "weights_mb": rounded(weights[form] / MB),
            "extra_memory_mb": rounded(memory[form] / MB), "extra_memory_beyond_gradients_mb": rounded(beyond[form] / MB),
        }  # fmt: skip
        times, bytes_, more = (ratio(figure[form], figure["lumos"]) for figure in (seconds, memory, beyond))
        table.append([
            NAMES[form], shown(length / seconds[form]), shown(seconds[form]), shown(times), shown(memory[form] / MB), shown(bytes_),
            shown(beyond[form] / MB), shown(more), f"{share:.0%}",
        ])  # fmt: skip
    full = {form: memory[form] + 2 * weights[form] for form in FORMS}
    figures = {"memory": memory, "memory_beyond_gradients": beyond, "memory_with_optimizer": full, "time": seconds}
    ratios = {
        f"published_over_lumos_{name}{way}": ratio(figure[f"published{way}"], figure[f"lumos{way}"])
        for way in ("", KEPT)
        for name, figure in figures.items()
    } | {
        "lumos_over_llama_time": ratio(seconds["lumos"], seconds["llama"]),
        "lumos_over_llama_memory": ratio(memory["lumos"], memory["llama"]),
    }
    return Report({**asdict(settings), "forms": NAMES}, row, ratios, [table])


def timed_forms(config: LumosConfig, settings: TrainingBenchmarkSettings, bench: Bench) -> tuple[dict[str, float], float, int]:
    """Time the forms in turn.

    Returns (fastest seconds of each form, largest difference between the forms of lumos and published, number of
    supervised positions).
    """
    return_freed_memory(torch.device(bench.device))
    torch.manual_seed(0)
    ours = with_optimizer(LumosForVideoGeneration(config), **bench.place)
    llama = with_optimizer(LlamaForCausalLM(llama_config(config, settings.tokens)), **bench.place)
    ids, targets = (x.to(bench.device) for x in batch(config, settings))
    forms = {form: step_of(form, *(llama if form == "llama" else ours), ids, targets) for form in FORMS}
    seconds, difference = interleaved(forms, bench, "a training step", choose=min)
    return seconds, difference, int((targets >= 0).sum())
