"""Three nodes: load a model, text to video, image (or clip) to video.

ComfyUI's IMAGE is a float tensor [B, H, W, C] in [0, 1]; a clip is an IMAGE whose B counts frames. Frames are decoded as soon as
their latent frame is done: they are the preview, and together the result. Numbers left at 0, or at -1 where 0 means something,
are the model's own defaults.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lumos import VideoPipeline
from lumos.errors import UserError, shown
from lumos.pipeline.inputs import MAX_SEED
from lumos.pipeline.options import WHOLE, Option, all_options
from lumos.pipeline.request import Request

KIND = "lumos"
PREVIEW_PIXELS = 512

folder_paths.add_model_folder_path(KIND, os.path.join(folder_paths.models_dir, KIND))


def model_folders() -> dict[str, str]:
    """Name -> path of the model folders in models/lumos and wherever extra_model_paths.yaml says."""
    found = {}
    for place in folder_paths.get_folder_paths(KIND):
        for name in sorted(os.listdir(place)) if os.path.isdir(place) else ():
            if os.path.isfile(os.path.join(place, name, "config.json")):
                found.setdefault(name, os.path.join(place, name))
    return found


class LumosLoader:
    RETURN_TYPES = ("LUMOS_MODEL",)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"
    CATEGORY = "Lumos"
    DESCRIPTION = "Loads a Lumos model folder from models/lumos."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (sorted(model_folders()), {"tooltip": "a folder in models/lumos"}),
                "dtype": (["auto", "bfloat16", "float16", "float32"], {"tooltip": "auto: bfloat16 on a GPU, else float32"}),
            }
        }

    def load(self, model: str, dtype: str) -> tuple[VideoPipeline]:
        folders = model_folders()
        if model not in folders:
            raise UserError(f"there is no model {shown(model)} in models/{KIND}; found: {', '.join(folders) or 'none'}")
        wanted = None if dtype == "auto" else getattr(torch, dtype)
        return (VideoPipeline.from_pretrained(folders[model], dtype=wanted, device=comfy.model_management.get_torch_device()),)


class LumosTextToVideo:
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("images", "fps")
    FUNCTION = "generate"
    CATEGORY = "Lumos"
    DESCRIPTION = "A clip, or with num_frames 1 a picture, from words."
    GIVEN: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def whole(tooltip: str, step: int = 1, maximum: int = 8192) -> tuple:
            return ("INT", {"default": 0, "min": 0, "max": maximum, "step": step, "tooltip": f"{tooltip}; 0: the model's own"})

        sampling = {name: sampling_input(option) for name, option in all_options().items() if option.step is not None}
        common = {name: sampling.pop(name) for name in ("num_inference_steps", "guidance_scale")}
        return {
            "required": {
                "model": ("LUMOS_MODEL",),
                **cls.GIVEN,
                "prompt": ("STRING", {"multiline": True, "dynamicPrompts": True, "default": "", "tooltip": "what the clip shows"}),
                "negative_prompt": ("STRING", {"multiline": True, "default": "", "tooltip": "what guidance leads away from"}),
                "width": whole("pixels", 16),
                "height": whole("pixels", 16),
                "num_frames": whole("1 + a multiple of 4, given frames included"),
                "fps": whole("frames per second", maximum=120),
                **common,
                "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
            },
            "optional": sampling,
        }

    def generate(self, model: VideoPipeline, prompt: str, **options: Any) -> tuple[Tensor, float]:
        return make_clip(model, prompt, **asked(**options))


class LumosImageToVideo(LumosTextToVideo):
    DESCRIPTION = "A clip that begins with a picture, or that goes on where a clip ends."
    GIVEN: ClassVar[dict[str, Any]] = {
        "images": ("IMAGE", {"tooltip": "one picture: the first frame; several: a clip, whose last frames the result begins with"})
    }

    def generate(self, model: VideoPipeline, images: Tensor, prompt: str, **options: Any) -> tuple[Tensor, float]:
        given = images[..., :3].clamp(0, 1).cpu().numpy()
        begin = {"image": given[0]} if len(given) == 1 else {"video": given}
        return make_clip(model, prompt, **begin, **asked(**options))


def unset(option: Option) -> int:
    """The value of an input that stands for the model's own: one that the option itself does not allow."""
    return 0 if option.slider[0] > 0 else -1


def sampling_input(option: Option) -> tuple:
    """The input of a sampling option."""
    value, number = unset(option), int if option.kind == WHOLE else float
    return ("INT" if number is int else "FLOAT", {
        "default": number(value), "min": number(value), "max": number(option.most), "step": option.step,
        "tooltip": f"{option.meaning}; {value}: the model's own",
    })  # fmt: skip


def asked(*, negative_prompt: str, seed: int, **values: float) -> dict[str, Any]:
    """A node's inputs as the pipeline's arguments: an input that was left as it is becomes None."""
    options = all_options()
    left = {name: unset(options[name]) if name in options else 0 for name in values}
    given = {name: None if value == left[name] else value for name, value in values.items()}
    return {"negative_prompt": negative_prompt, "seed": seed, **given}


def make_clip(pipe: VideoPipeline, prompt: str, **options: Any) -> tuple[Tensor, float]:
    """The clip as IMAGE [T, H, W, 3] and its rate; the interface sees each step, and each latent frame's last picture."""
    encoded = pipe.encode(pipe.resolve(Request.of(prompt, **options)))
    resolved, frames = encoded.resolved, []
    steps_before = resolved.sampling.steps_before
    total = steps_before(resolved.new_frames)
    bar = comfy.utils.ProgressBar(total)

    def on_step(frame: int, new_frames: int, step: int, steps: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if step + 1 < steps:  # after its last step a frame can be seen
            bar.update_absolute(steps_before(frame) + step + 1, total)

    for (part,) in pipe.stream_encoded(encoded, on_step):
        frames.append(part)
        if made := len(frames) - bool(encoded.given):
            bar.update_absolute(steps_before(made), total, ("JPEG", Image.fromarray(part[-1]), PREVIEW_PIXELS))
    return torch.from_numpy(np.concatenate(frames)).float() / 255, float(resolved.clip.fps)


NODE_CLASS_MAPPINGS = {
    "LumosLoader": LumosLoader,
    "LumosTextToVideo": LumosTextToVideo,
    "LumosImageToVideo": LumosImageToVideo,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LumosLoader": "Load Lumos Model",
    "LumosTextToVideo": "Lumos Text to Video",
    "LumosImageToVideo": "Lumos Image to Video",
}
