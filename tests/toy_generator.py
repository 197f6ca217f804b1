"""A second generator for the contract tests: flow matching over latents, with every part that the registry names.

The parts that `--help` loads are in `toy_options.py`, because this file imports torch.

The velocity v(x, t) of a linear path from noise to latents is learned by a small convolution; sampling integrates it with Euler
steps from noise at t = 0 to latents at t = 1. A whole clip is made at once.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from toy_options import ToyOptions
from transformers import PreTrainedConfig, PreTrainedModel

from lumos.data.seeding import sample_generator
from lumos.files import read_json, write_json
from lumos.pipeline.base import Encoded, VideoPipeline
from lumos.pipeline.defaults import ClipDefaults
from lumos.pipeline.inputs import override
from lumos.pipeline.request import Request, resolve
from lumos.planning.fixed_memory import fixed_bytes
from lumos.planning.sharding import PARTS
from lumos.registry import Benchmark, Generator
from lumos.runtime import bars_on_terminals, pick_device
from lumos.settings import setting
from lumos.training import checkpoint
from lumos.training.export import export_checkpoint
from lumos.training.samples import Sampler
from lumos.training.settings import TrainingSettings
from lumos.training.task import Batch
from lumos.training.video_task import VideoTask
from lumos.video.frames import from_uint8, to_uint8
from tokenizer import TextTokenizer, VideoTokenizer

GENERATOR = Generator(
    name="toy", summary="flow matching by one convolution, for tests", model_types=("toy",),
    config="toy_generator:ToyConfig", model="toy_generator:ToyModel", pipeline="toy_generator:ToyPipeline",
    task="toy_generator:ToyTask", settings="toy_generator:ToySettings", sampling="toy_options:ToyOptions",
    cost={"training": "toy_generator", "clip": "toy_generator"},
    benchmarks={"toy": Benchmark("seconds of one velocity", "toy_generator", "toy_options:add_arguments")},
)  # fmt: skip


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, channels: int = 4, hidden: int = 8, max_prompt_tokens: int = 64, **more: Any):
        self.channels, self.hidden, self.max_prompt_tokens = channels, hidden, max_prompt_tokens
        super().__init__(**more)

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        return ("toy-tiny",)


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.first = nn.Conv3d(config.channels + 2, config.hidden, 3, padding=1)
        self.last = nn.Conv3d(config.hidden, config.channels, 3, padding=1)
        self.post_init()

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """x [B, C, t, h, w], time [B], text [B] -> velocity [B, C, t, h, w]."""
        planes = [value.view(-1, 1, 1, 1, 1).expand(-1, 1, *x.shape[2:]) for value in (t, text)]
        return self.last(torch.tanh(self.first(torch.cat([x, *planes], dim=1))))


def text_value(prompt: str | None) -> float:
    """Return the number in [-1, 1] that stands for a prompt, from a hash of its text."""
    return 0.0 if prompt is None else int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:2], "little") / 32768 - 1


@dataclass
class ToySettings(TrainingSettings):
    sampling = ToyOptions
    width: int = setting(8, "hidden channels", low=1, high=64)


class ToyPipeline(VideoPipeline):
    generator, sampling, largest_side, tensor_inputs = "toy", ToyOptions, 1024, ("latents",)

    def __init__(self, model, text_tokenizer, video_tokenizer, settings=None, clip=None):
        self.model, self.text_tokenizer, self.video_tokenizer = model.eval(), text_tokenizer, video_tokenizer.eval()
        self.settings, self.clip = settings or ToyOptions(), clip or ClipDefaults(5, 32, 32, 8, None)

    @classmethod
    def from_pretrained(cls, folder, *, device=None, dtype=None, **_: Any):
        device, folder = pick_device(device), Path(folder)
        _, settings, clip = model_of(folder, None)
        video = VideoTokenizer.from_pretrained(folder, device=device)
        return cls(ToyModel.from_pretrained(folder).to(device), TextTokenizer.from_pretrained(folder), video, settings, clip)

    @bars_on_terminals()
    def save_pretrained(self, folder):
        write_folder(Path(folder), self.model, self.text_tokenizer, self.video_tokenizer, self.settings, self.clip)

    @property
    def temporal_compression(self):
        return self.video_tokenizer.temporal_compression

    @property
    def size_unit(self):
        return self.video_tokenizer.spatial_compression

    def resolved(self, request: Request):
        return resolve(request, self.settings, self.clip, generator="toy", size_unit=self.size_unit,
                       largest_side=self.largest_side, temporal_compression=self.temporal_compression)  # fmt: skip

    def encoded(self, resolved):
        return Encoded(resolved=resolved, given=[])

    @torch.inference_mode()
    def latents(self, encoded, after_step):
        """Latents [B, t, C, h, w]; latent frames of given pictures are put back after each step."""
        resolved, clip, c = encoded.resolved, encoded.resolved.clip, self.video_tokenizer
        frames = 1 + (clip.num_frames - 1) // c.temporal_compression
        shape = (self.model.config.channels, frames, clip.height // c.spatial_compression, clip.width // c.spatial_compression)
        x = torch.stack([torch.randn(shape, generator=g) for g in encoded.generators()]) * resolved.sampling.noise_scale
        x = x.to(self.device)
        given = [(i, n // c.temporal_compression, self.encode_frames(picture[None])[0]) for i, frames in enumerate(resolved.given)
                 for n, picture in frames.items()]  # fmt: skip
        text = torch.tensor([[text_value(p) for p in prompts] for prompts in (resolved.prompts, resolved.negative_prompts)])
        steps, scale = resolved.sampling.num_inference_steps, resolved.sampling.guidance_scale
        for step in range(steps):
            t = torch.full((len(x),), step / steps, device=self.device)
            with_text, without = (self.model(x, t, row.to(self.device)) for row in text)
            x = x + (without + scale * (with_text - without)) / steps
            for i, n, latent in given:
                x[i, :, n] = latent.to(x)
            after_step(0, step, x)
        yield x.movedim(2, 1).cpu()

    def decoder(self):
        past: dict = {}

        @torch.inference_mode()
        def push(latents):
            values = latents.movedim(0, 1)[None].to(self.device)
            return np.concatenate([to_uint8(self.video_tokenizer.decode_latent(v, past)[0]) for v in values.split(1, dim=2)])

        return push

    @torch.inference_mode()
    def encode_frames(self, frames):
        codes = self.video_tokenizer.encode(from_uint8(frames)[None].to(self.device))
        return self.video_tokenizer.values(codes)[0].movedim(1, 0).cpu()

    def prompt_tokens(self, prompt, clip):
        return len(self.text_tokenizer.encode(prompt))

    def step_hook(self, callback, names, encoded, done):
        return lambda frame, step, state: callback(self, step, 0, dict.fromkeys(names, state)) and None

    def is_open(self, resolved, step, state):
        return False


class ToyTask(VideoTask):
    size_unit = 8

    def __init__(self, settings: ToySettings, device: torch.device):
        super().__init__(settings, device)
        self.source = self.make_source()
        self.loss_groups = {"frame": 1 + (settings.data.num_frames - 1) // self.video_tokenizer.temporal_compression}
        self.config = ToyConfig(self.video_tokenizer.config.embedding_dim, settings.width)

    def build_model(self):
        torch.manual_seed(self.settings.training.seed)
        return ToyModel(self.config).train()

    def prepare(self, step, shape, positions, *, dropout=True):
        clips, seed = self.source.clips(step, shape, positions), self.settings.training.seed
        draws = [sample_generator(seed, step, position, "flow") for position in positions]
        return step, shape.kind, clips, draws

    def encode(self, prepared):
        step, kind, clips, draws = prepared
        codes = self.video_tokenizer.encode(from_uint8(torch.from_numpy(np.stack([clip.frames for clip in clips]))).to(self.device))
        latents = self.video_tokenizer.values(codes)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in draws]).to(latents)
        times = torch.stack([torch.rand((), generator=g) for g in draws]).to(latents)
        tensors = {"latents": latents, "noise": noise, "times": times, "asked": torch.ones(len(clips)).to(latents),
                   "text": torch.tensor([text_value(clip.caption) for clip in clips]).to(latents)}  # fmt: skip
        frames = latents.shape[2]
        return Batch(step, kind, tensors, [clip.name for clip in clips], [latents[0, 0].numel()] * len(clips), 1e6,
                     len(clips) * frames, padded=(), idle={"asked": 0.0})  # fmt: skip

    def losses(self, model, micro):
        at = micro["times"].view(-1, 1, 1, 1, 1)
        x = (1 - at) * micro["noise"] + at * micro["latents"]
        error = model(x, micro["times"], micro["text"]) - (micro["latents"] - micro["noise"])
        losses = error.square().mean(dim=(1, 3, 4))[micro["asked"] > 0]  # [B, t]
        frame = torch.arange(losses.shape[1], device=losses.device).expand_as(losses)
        return losses.flatten(), {"frame": frame.flatten()}

    def resume_fingerprint(self):
        return {"width": self.settings.width} | self.data_fingerprint()

    def export_metadata(self):
        return {"config": self.config.to_dict(), "tokenizers": vars(self.places), "fingerprints": self.fingerprints, "lora": None,
                "clip": self.source.usual_shape}  # fmt: skip

    def export(self, folder, target):
        export_checkpoint(folder, checkpoint.read_state(folder), target)

    def pipeline_of(self, model, settings):
        return ToyPipeline(model, None, self.video_tokenizer, settings, self.sample_shape)

    def preview(self, weights):
        model = ToyModel(self.config)
        model.load_state_dict(weights)
        pipe = self.pipeline_of(model, ToyOptions())
        return Sampler(lambda prompt, seed, on_step: pipe(prompt, seed=seed, output_type="uint8", on_step=on_step).frames[0],
                       self.sample_shape.fps, {})  # fmt: skip

    @staticmethod
    def parameter_shapes(metadata):
        return {name: p.shape for name, p in ToyModel(ToyConfig(**metadata["config"])).named_parameters()}

    @staticmethod
    def write_folder(folder, weights, metadata, tokenizers, dtype):
        model = ToyModel(ToyConfig(**metadata["config"]))
        model.load_state_dict(weights)
        text, video = TextTokenizer.from_pretrained(tokenizers.text), VideoTokenizer.from_pretrained(tokenizers.video)
        write_folder(folder, model.to(dtype), text, video, ToyOptions(), ClipDefaults(**metadata["clip"], target_size=None))


def write_folder(folder, model, text, video, options, clip):
    model.save_pretrained(folder)
    text.save_pretrained(folder / "text_tokenizer")
    video.save_pretrained(folder / "video_tokenizer")
    write_json(folder / "pipeline.json", {"sampling": vars(options), "clip": vars(clip)})


# ---- cost

@dataclass(frozen=True)
class ToyCost:
    parameters: int
    is_tuned: bool = False
    matrices: int = 0
    stacked: int = 0
    trained_shapes: tuple[tuple[int, ...], ...] = ()
    largest_parameter: int = 0
    size_unit: int = 8
    assumed: tuple[str, ...] = field(default=())

    @property
    def trained(self):
        return self.parameters

    def cast_parameters(self, checkpointing):
        return self.parameters

    def sequence(self, num_frames, height, width):
        return (1 + (num_frames - 1) // 4) * (height // 8) * (width // 8)

    def tokens(self, sequence):
        return sequence

    codes = supervised = tokens

    def training_flops(self, sequence, supervised):
        return 6.0 * self.parameters * sequence

    def recomputed_flops(self, sequence):
        return 2.0 * self.parameters * sequence

    def memory_moments(self, sharding, rows, sequence):
        parts = dict.fromkeys(PARTS, 0) | fixed_bytes(self, sharding) | {"activations": 64 * rows * sequence}
        return {"start": dict.fromkeys(PARTS, 0) | {"weights": 4 * self.parameters}, "backward": parts}


def training_cost(settings, text_tokens):
    return ToyCost(sum(p.numel() for p in ToyModel(ToyConfig(hidden=settings.width)).parameters()))


def model_of(folder, preset):
    if preset:
        return ToyConfig(), ToyOptions(), ClipDefaults(5, 32, 32, 8, None)
    stored = read_json(Path(folder) / "pipeline.json", "the defaults of a model")
    return ToyConfig.from_pretrained(folder), ToyOptions(**stored["sampling"]), ClipDefaults(**stored["clip"])


@dataclass(frozen=True)
class ToyClipCost:
    clip: ClipDefaults
    settings: ToyOptions

    def warn_of_effects(self, given):
        pass

    def report(self, peak, utilisation):
        steps, flops = self.settings.num_inference_steps, 1e6
        return {"parameters": 1, "clip": vars(self.clip), "latent_frames": 1, "codes_of_a_frame": 1, "rows": 2, "tokens": 1,
                "steps": steps, "may_end_early": False, "flops": {"layers": flops, "attention": 0.0, "head": 0.0, "total": flops},
                "bytes": {"weights": 4}, "peak": peak, "utilisation": utilisation, "seconds": flops / peak}  # fmt: skip


def clip_cost(config, clip, sampling, text_tokens, dtype):
    return ToyClipCost(override(clip), sampling)


def out_of_memory_advice(config, clip, sampling, text_tokens, dtype, clips=1):
    return "make it smaller"


# ---- benchmark

def settings_from(args):
    return args


def steps(settings, bench):
    return 1


def run(settings, bench):
    from lumos.benchmarks.measure import Report

    bench.step()
    return Report({"clips": settings.toy_clips}, {"seconds": 0.0}, {}, [[["toy"]]])
