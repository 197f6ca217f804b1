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

from lumos import LumosPipeline
from lumos.errors import UserError, shown
from lumos.pipeline.inputs import MAX_SEED
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

    def load(self, model: str, dtype: str) -> tuple[LumosPipeline]:
        folders = model_folders()
        if model not in folders:
            raise UserError(f"there is no model {shown(model)} in models/{KIND}; found: {', '.join(folders) or 'none'}")
        wanted = None if dtype == "auto" else getattr(torch, dtype)
        return (LumosPipeline.from_pretrained(folders[model], dtype=wanted, device=comfy.model_management.get_torch_device()),)


class LumosTextToVideo:
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("images", "fps")
    FUNCTION = "generate"
    CATEGORY = "Lumos"
    DESCRIPTION = "A clip, or with num_frames 1 a picture, from words."
    GIVEN: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def real(tooltip: str, unset: float, maximum: float, step: float) -> tuple:
            return ("FLOAT", {"default": unset, "min": unset, "max": maximum, "step": step,
                              "tooltip": f"{tooltip}; {unset:.0f}: the model's own"})  # fmt: skip

        def whole(tooltip: str, step: int = 1, maximum: int = 8192) -> tuple:
            return ("INT", {"default": 0, "min": 0, "max": maximum, "step": step, "tooltip": f"{tooltip}; 0: the model's own"})

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
                "num_inference_steps": whole("steps of each latent frame", maximum=1000),
                "guidance_scale": real("from 1 (no guidance)", 0.0, 100.0, 0.1),
                "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
            },
            "optional": {
                "temperature": real("noise on the confidence", -1.0, 100.0, 0.05),
                "history_mask_ratio": real("share of each finished frame hidden from later ones", -1.0, 0.99, 0.05),
            },
        }

    def generate(self, model: LumosPipeline, prompt: str, **options: Any) -> tuple[Tensor, float]:
        return make_clip(model, prompt, **asked(**options))


class LumosImageToVideo(LumosTextToVideo):
    DESCRIPTION = "A clip that begins with a picture, or that goes on where a clip ends."
    GIVEN: ClassVar[dict[str, Any]] = {
        "images": ("IMAGE", {"tooltip": "one picture: the first frame; several: a clip, whose last frames the result begins with"})
    }

    def generate(self, model: LumosPipeline, images: Tensor, prompt: str, **options: Any) -> tuple[Tensor, float]:
        given = images[..., :3].clamp(0, 1).cpu().numpy()
        begin = {"image": given[0]} if len(given) == 1 else {"video": given}
        return make_clip(model, prompt, **begin, **asked(**options))


def asked(
    *, negative_prompt: str, seed: int, temperature: float = -1.0, history_mask_ratio: float = -1.0, **shape: float
) -> dict[str, Any]:  # fmt: skip
    """A node's inputs as the pipeline's arguments: what is left at 0 or -1 becomes None."""
    return {
        "negative_prompt": negative_prompt, "seed": seed,
        "temperature": None if temperature < 0 else temperature,
        "history_mask_ratio": None if history_mask_ratio < 0 else history_mask_ratio,
        **{name: value or None for name, value in shape.items()},
    }  # fmt: skip


def make_clip(pipe: LumosPipeline, prompt: str, **options: Any) -> tuple[Tensor, float]:
    """The clip as IMAGE [T, H, W, 3] and its rate; the interface sees each step, and each latent frame's last picture."""
    ready = pipe.prepare(Request(prompt, **options))
    steps_before, frames = ready.sampling.steps_before, []
    total = steps_before(ready.new_frames)
    bar = comfy.utils.ProgressBar(total)

    def on_step(frame: int, new_frames: int, step: int, steps: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if step + 1 < steps:  # after its last step a frame can be seen
            bar.update_absolute(steps_before(frame) + step + 1, total)

    for (part,) in pipe.stream_prepared(ready, on_step):
        frames.append(part)
        if made := len(frames) - bool(ready.given):
            bar.update_absolute(steps_before(made), total, ("JPEG", Image.fromarray(part[-1]), PREVIEW_PIXELS))
    return torch.from_numpy(np.concatenate(frames)).float() / 255, float(ready.clip.fps)


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
