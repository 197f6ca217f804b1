"""What the generation bench measures: a decoder, prompt and clip shape (a `Case`), made by the engine and by the twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lumos.models.lumos1.benchmarks.arguments import SHIPPED
from lumos.models.lumos1.benchmarks.baseline import Watch, plain_frames
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.engine import Engine, cache_tokens, code_offsets, generate_frames
from lumos.models.lumos1.modeling import LumosForVideoGeneration
from lumos.models.lumos1.request import prompt_ids
from lumos.models.lumos1.sequence import Frame, build_prefix, clip_header, num_latent_frames
from lumos.models.lumos1.settings import GenerationSettings

TEXT_TOKENS = 64  # of the prompt of a model with random weights
WIDE = (32, 56)  # codes of a latent frame of 448 x 256 pixels


@dataclass(frozen=True)
class Shape:
    """A decoder of random weights and the clip it makes; steps of each latent frame."""

    preset: str
    sizes: dict[str, int]
    grid: tuple[int, int]
    frames: int
    steps: int


MID = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
SHAPES = {
    "0.5b": Shape("0.5b", {}, WIDE, frames=3, steps=4),
    "mid": Shape("0.5b", MID, WIDE, frames=7, steps=4),
    "small": Shape("tiny", SMALL, (4, 6), frames=3, steps=3),
}


@dataclass(frozen=True)
class Case:
    """One clip to make. conditional, unconditional: ids of the two prefixes, without guidance only of the first; frames: latent
    frames, of grid (h, w) codes."""

    model: LumosForVideoGeneration
    conditional: Tensor
    unconditional: Tensor | None
    grid: tuple[int, int]
    frames: int
    settings: GenerationSettings

    def cut(self, *, steps: int, frames: int | None = None) -> Case:
        """The same with at most so many steps and frames."""
        steps, frames = min(steps, self.settings.num_inference_steps), min(frames or self.frames, self.frames)
        return replace(self, frames=frames, settings=replace(self.settings, num_inference_steps=steps))

    @property
    def span(self) -> int:
        """Tokens of a latent frame."""
        return Frame(0, *self.grid).end

    @property
    def prefix_lengths(self) -> list[int]:
        return [len(ids) for ids in (self.conditional, self.unconditional) if ids is not None]

    @property
    def tokens(self) -> int:
        """Cached tokens of the longest row."""
        return cache_tokens(max(self.prefix_lengths), self.span, self.frames, self.settings.history_frames)

    @property
    def cache_bytes(self) -> int:
        return len(self.prefix_lengths) * self.tokens * self.model.kv_bytes_per_token()


def make_case(shape: str, folder: str, prompt: str, device: str, dtype: str) -> Case:
    """The case of a name in SHAPES, or the model in `folder` at its own defaults, guided, without what trades."""
    if shape == SHIPPED:
        return folder_case(folder, prompt, device, dtype)
    of = SHAPES[shape]
    config = LumosConfig.preset(of.preset, **of.sizes)
    torch.manual_seed(0)
    model = LumosForVideoGeneration(config).to(device, getattr(torch, dtype)).eval()
    text = [i for i in range(config.visual_token_start) if not config.is_reserved(i)][-TEXT_TOKENS:]
    settings = GenerationSettings(num_inference_steps=of.steps)
    return Case(model, *prefixes(text, 12, 2, config), of.grid, of.frames, settings)


def folder_case(folder: str, prompt: str, device: str, dtype: str) -> Case:
    from lumos.models.lumos1.pipeline import LumosPipeline

    pipe = LumosPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), device=device)
    clip, settings, config = pipe.clip, pipe.settings, pipe.model.config
    if settings.guidance_scale == 1:  # the twin has two branches
        settings = replace(settings, guidance_scale=GenerationSettings.guidance_scale)
    duration, fps = clip_header(clip.num_frames, clip.fps)
    grid = (clip.height // config.spatial_compression, clip.width // config.spatial_compression)
    frames = num_latent_frames(clip.num_frames, config.temporal_compression)
    # The baseline knows neither filters nor options that trade.
    options = GenerationSettings.declared().items()
    plain = {name: option.default for name, option in options if option.is_trade or name in ("top_k", "top_p")}
    settings, text = replace(settings, **plain), prompt_ids(prompt, clip, config, pipe.text_tokenizer)
    return Case(pipe.model, *prefixes(text, fps, duration, config), grid, frames, settings)


def prefixes(text: Sequence[int], fps: int, duration: int, config: LumosConfig) -> tuple[Tensor, Tensor]:
    conditional, unconditional = (
        torch.tensor(build_prefix(ids, fps=fps, duration=duration, config=config)) for ids in (list(text), None)
    )
    return conditional, unconditional


def generate(case: Case, seed: int = 0) -> None:
    """By the engine."""
    for _ in generate_frames(
        case.model, [case.conditional], [case.unconditional], grid=case.grid, new_frames=case.frames, settings=case.settings,
        generators=[torch.Generator().manual_seed(seed)],
    ):  # fmt: skip
        pass


def generate_plainly(case: Case, seed: int = 0, watch: Watch = lambda ids, logits: None) -> None:
    """By the twin."""
    for _ in plain_frames(
        case.model, case.conditional, case.unconditional, grid=case.grid, new_frames=case.frames, settings=case.settings,
        seed=seed, watch=watch,
    ):  # fmt: skip
        pass


@dataclass(frozen=True)
class Difference:
    """Visual logits of both branches, ours against the twin's: largest |ours - theirs|, largest |theirs|, and the share of
    positions where both have the same likeliest code."""

    largest: float
    scale: float
    same_likeliest: float


def logits_difference(case: Case, model: LumosForVideoGeneration | None = None) -> Difference:
    """The engine, with the case's model or another of its kind, is fed the ids that the twin makes."""
    config, engine = case.model.config, Engine(model or case.model)
    rows = [case.conditional, case.unconditional]
    engine.prefill(rows, cache_tokens(max(map(len, rows)), case.span, case.frames))
    offsets = code_offsets(Frame(0, *case.grid)).to(case.model.device)
    first, steps = config.visual_token_start, []

    def watch(ids: Tensor, logits: Tensor | None) -> None:
        if logits is None:
            engine.commit(ids)
            return
        ours, theirs = engine.denoise(ids), logits[:, offsets, first : first + config.visual_token_count]
        same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
        steps.append((float((ours - theirs).abs().max()), float(theirs.abs().max()), float(same)))

    generate_plainly(case, watch=watch)
    differences, scales, same = zip(*steps, strict=True)
    return Difference(max(differences), max(scales), sum(same) / len(same))
