"""The cases of the generation benchmark. The engine and the baseline make the clip of the same `DecodingCase`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lumos.models.lumos1.benchmarks.arguments import SHIPPED
from lumos.models.lumos1.benchmarks.baseline import Watch, plain_frames
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.engine import DecodingEngine, cache_tokens, code_offsets
from lumos.models.lumos1.modeling import LumosForVideoGeneration
from lumos.models.lumos1.request import prompt_ids
from lumos.models.lumos1.sampling import generate_frames
from lumos.models.lumos1.sequence import Frame, build_prefix, clip_header, num_latent_frames
from lumos.models.lumos1.settings import GenerationSettings

TEXT_TOKENS = 64  # prompt tokens for a model with random weights
WIDE = (32, 56)  # rows and columns of codes of a latent frame of 448 x 256 pixels


@dataclass(frozen=True)
class Shape:
    """A decoder with random weights and the clip that it makes.

    preset  name of a model shape; sizes: its sizes that are changed
    grid    rows and columns of codes of a latent frame
    frames  latent frames
    steps   steps of each latent frame
    """

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
class DecodingCase:
    """One clip to make.

    conditional    ids of the prefix with the prompt
    unconditional  ids of the prefix without the prompt; None without guidance
    grid           rows and columns (h, w) of codes of a latent frame
    frames         number of latent frames
    without_given  ids of the prefix of the third branch, see `generate_frames`; None without it
    """

    model: LumosForVideoGeneration
    conditional: Tensor
    unconditional: Tensor | None
    grid: tuple[int, int]
    frames: int
    settings: GenerationSettings
    without_given: Tensor | None = None

    def cut(self, *, steps: int, frames: int | None = None) -> DecodingCase:
        """Return the case with at most `steps` steps a frame and `frames` latent frames."""
        steps, frames = min(steps, self.settings.num_inference_steps), min(frames or self.frames, self.frames)
        return replace(self, frames=frames, settings=replace(self.settings, num_inference_steps=steps))

    @property
    def span(self) -> int:
        """The number of tokens of a latent frame."""
        return Frame(0, *self.grid).end

    @property
    def prefix_lengths(self) -> list[int]:
        return [len(ids) for ids in (self.conditional, self.unconditional, self.without_given) if ids is not None]

    @property
    def tokens(self) -> int:
        """The number of tokens in the cache for the longer of the prefixes."""
        return cache_tokens(max(self.prefix_lengths), self.span, self.frames, self.settings.history_frames)

    @property
    def cache_bytes(self) -> int:
        return len(self.prefix_lengths) * self.tokens * self.model.kv_bytes_per_token()


def make_case(shape: str, folder: str, prompt: str, device: str, dtype: str) -> DecodingCase:
    """Return the case of a name in SHAPES, or for "shipped" that of the model in `folder`."""
    if shape == SHIPPED:
        return folder_case(folder, prompt, device, dtype)
    of = SHAPES[shape]
    config = LumosConfig.preset(of.preset, **of.sizes)
    torch.manual_seed(0)
    model = LumosForVideoGeneration(config).to(device, getattr(torch, dtype)).eval()
    text = [i for i in range(config.visual_token_start) if not config.is_reserved(i)][-TEXT_TOKENS:]
    settings = GenerationSettings(num_inference_steps=of.steps)
    return DecodingCase(model, *prefixes(text, 12, 2, config), of.grid, of.frames, settings)


def folder_case(folder: str, prompt: str, device: str, dtype: str) -> DecodingCase:
    """Return the case of a model folder at its default settings.

    Guidance is on, and options that trade quality for time or memory are off, as in the baseline.
    """
    from lumos.models.lumos1.pipeline import LumosPipeline

    pipe = LumosPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), device=device)
    clip, settings, config = pipe.clip, pipe.settings, pipe.model.config
    if settings.guidance_scale == 1:  # the baseline always has two branches
        settings = replace(settings, guidance_scale=GenerationSettings.guidance_scale)
    duration, fps = clip_header(clip.num_frames, clip.fps)
    grid = (clip.height // config.spatial_compression, clip.width // config.spatial_compression)
    frames = num_latent_frames(clip.num_frames, config.temporal_compression)
    # The baseline supports neither top_k and top_p nor options that trade quality for time or memory.
    options = GenerationSettings.declared().items()
    plain = {name: option.default for name, option in options if option.is_trade or name in ("top_k", "top_p")}
    settings, text = replace(settings, **plain), prompt_ids(prompt, clip, config, pipe.text_tokenizer)
    return DecodingCase(pipe.model, *prefixes(text, fps, duration, config), grid, frames, settings)


def prefixes(text: Sequence[int], fps: int, duration: int, config: LumosConfig) -> tuple[Tensor, Tensor]:
    conditional, unconditional = (
        torch.tensor(build_prefix(ids, fps=fps, duration=duration, config=config)) for ids in (list(text), None)
    )
    return conditional, unconditional


def generate(case: DecodingCase, seed: int = 0) -> None:
    """Make the clip of a case with the engine."""
    for _ in generate_frames(
        case.model, [case.conditional], [case.unconditional], grid=case.grid, new_frames=case.frames, settings=case.settings,
        generators=[torch.Generator().manual_seed(seed)],
    ):  # fmt: skip
        pass


def generate_plainly(case: DecodingCase, seed: int = 0, watch: Watch = lambda ids, logits: None) -> None:
    """Make the clip of a case with the baseline."""
    for _ in plain_frames(
        case.model, case.conditional, case.unconditional, grid=case.grid, new_frames=case.frames, settings=case.settings,
        seed=seed, watch=watch,
    ):  # fmt: skip
        pass


@dataclass(frozen=True)
class Difference:
    """The difference of the visual logits of both branches between the engine (ours) and the baseline (theirs).

    largest         largest |ours - theirs|
    scale           largest |theirs|
    same_likeliest  share of the positions where both have the same likeliest code
    """

    largest: float
    scale: float
    same_likeliest: float


def logits_difference(case: DecodingCase, model: LumosForVideoGeneration | None = None) -> Difference:
    """Return the difference of the logits of engine and baseline for the ids that the baseline samples.

    `model` is the model of the engine; default: that of the case.
    """
    config, engine = case.model.config, DecodingEngine(model or case.model)
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
