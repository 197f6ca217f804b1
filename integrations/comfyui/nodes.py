"""Four ComfyUI nodes: two load a model and a LoRA adapter, two make a video from text, and from an image or a clip.

ComfyUI's IMAGE is a float tensor [B, H, W, C] in [0, 1]; in a clip, B is the number of frames. The
frames of a latent frame are decoded as soon as it is done, and the last of them is shown as a
preview. An input that is left at 0, or at -1 if 0 is an allowed value, takes the default of the
model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
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
from lumos.lora import is_adapter
from lumos.pipeline.inputs import MAX_SEED
from lumos.pipeline.options import CHOICE, FLAG, WHOLE, Option, all_options
from lumos.pipeline.request import Request

KIND = "lumos"
ADAPTERS = "loras"
PREVIEW_PIXELS = 512
STRIDE = 4
"""Frames of a latent frame of Lumos-1. STIV takes any number of frames, of which a graph can ask for 1 + a multiple of this."""
MAX_FRAMES = 1 + 2047 * STRIDE
SAVED_ORDER = (
    "num_inference_steps", "guidance_scale", "temperature", "history_mask_ratio", "mask_given_frames", "history_thinning",
    "guidance_renorm", "solver", "null_image", "keep_given_pixels",
)  # fmt: skip
"""The order of the sampling inputs. A saved workflow holds values by place, so new inputs come behind these."""
SAVED_BEHIND = ("image_guidance_scale",)
"""The order of the sampling inputs behind those of `LumosImageToVideo` that are no sampling options; new ones follow."""

folder_paths.add_model_folder_path(KIND, os.path.join(folder_paths.models_dir, KIND))


def model_folders() -> dict[str, str]:
    """Return the paths of the model folders by name, from models/lumos and from the folders in extra_model_paths.yaml."""
    return folders_in(KIND, lambda path: (path / "config.json").is_file())


def adapter_folders() -> dict[str, str]:
    """Return the paths of the adapter folders by name, from models/loras and from the folders in extra_model_paths.yaml."""
    return folders_in(ADAPTERS, is_adapter)


def folders_in(kind: str, is_wanted: Callable[[Path], bool]) -> dict[str, str]:
    found: dict[str, str] = {}
    for place in folder_paths.get_folder_paths(kind):
        for name in sorted(os.listdir(place)) if os.path.isdir(place) else ():
            if is_wanted(Path(place, name)):
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
                "dtype": (["auto", "bfloat16", "float16", "float32"], {"tooltip": "auto: bfloat16 on a GPU, float32 otherwise"}),
            }
        }

    def load(self, model: str, dtype: str) -> tuple[VideoPipeline]:
        folders = model_folders()
        if model not in folders:
            raise UserError(f"there is no model {shown(model)} in models/{KIND}; found: {', '.join(folders) or 'none'}")
        wanted = None if dtype == "auto" else getattr(torch, dtype)
        return (VideoPipeline.from_pretrained(folders[model], dtype=wanted, device=comfy.model_management.get_torch_device()),)


class LumosLoraLoader:
    RETURN_TYPES = ("LUMOS_MODEL",)
    RETURN_NAMES = ("model",)
    FUNCTION = "load"
    CATEGORY = "Lumos"
    DESCRIPTION = "Adds a LoRA adapter, the export of a run with lora.rank, to a copy of a model; several in a row add up."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("LUMOS_MODEL",),
                "lora": (sorted(adapter_folders()), {"tooltip": "an adapter folder in models/loras"}),
                "strength": ("FLOAT", {"default": 1.0, "min": -4.0, "max": 4.0, "step": 0.05,
                                       "tooltip": "factor of what the adapter adds to the weights; 0: the model as it is"}),
            }
        }  # fmt: skip

    def load(self, model: VideoPipeline, lora: str, strength: float) -> tuple[VideoPipeline]:
        folders = adapter_folders()
        if lora not in folders:
            raise UserError(f"there is no adapter {shown(lora)} in models/{ADAPTERS}; found: {', '.join(folders) or 'none'}")
        changed = model.copied()  # ComfyUI may go on using the model as it came
        changed.load_lora_weights(folders[lora])
        changed.set_scale(strength)
        return (changed,)


class LumosTextToVideo:
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("images", "fps")
    FUNCTION = "generate"
    CATEGORY = "Lumos"
    DESCRIPTION = "Makes a clip, or a picture if num_frames is 1, from a prompt."
    GIVEN: ClassVar[dict[str, Any]] = {}
    OPTIONAL: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def whole(tooltip: str, step: int = 1, maximum: int = 8192) -> tuple:
            return ("INT", {"default": 0, "min": 0, "max": maximum, "step": step, "tooltip": f"{tooltip}; 0: the model's default"})

        shown = [option for option in all_options().values() if option.has_control]
        place = {name: i for i, name in enumerate((*SAVED_ORDER, *SAVED_BEHIND))}
        options = sorted(shown, key=lambda option: place.get(option.name, len(place)))
        sampling = {option.name: sampling_input(option) for option in options}
        common = {name: sampling.pop(name) for name in ("num_inference_steps", "guidance_scale")}
        saved = {name: sampling.pop(name) for name in SAVED_ORDER if name in sampling}
        return {
            "required": {
                "model": ("LUMOS_MODEL",),
                **cls.GIVEN,
                "prompt": ("STRING", {"multiline": True, "dynamicPrompts": True, "default": "", "tooltip": "what the clip shows"}),
                "negative_prompt": ("STRING", {"multiline": True, "default": "", "tooltip": "what the clip must not show"}),
                "width": whole("pixels", 16),
                "height": whole("pixels", 16),
                "num_frames": ("INT", {"default": 17, "min": 1, "max": MAX_FRAMES, "step": STRIDE,
                                       "tooltip": f"1 + a multiple of {STRIDE}, given frames included; 1 makes a picture"}),
                "fps": whole("frames per second", maximum=120),
                **common,
                "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
            },
            "optional": {**saved, **cls.OPTIONAL, **sampling},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, num_frames: int | None = None) -> bool | str:
        """Return True for frame counts that can be made, else a message. ComfyUI then leaves out its own check of the bounds.

        None stands for a value that another node makes. 0 is the model's default, which workflows of
        earlier versions hold.
        """
        if num_frames in (None, 0) or (1 <= num_frames <= MAX_FRAMES and num_frames % STRIDE == 1):
            return True
        below = max(1, min(MAX_FRAMES, num_frames - (num_frames - 1) % STRIDE))
        return f"num_frames {num_frames} is not possible; give 1 + a multiple of {STRIDE}, for example {below}"

    def generate(self, model: VideoPipeline, prompt: str, **options: Any) -> tuple[Tensor, float]:
        return make_clip(model, prompt, **pipeline_arguments(**options))


class LumosImageToVideo(LumosTextToVideo):
    DESCRIPTION = "Makes a clip that begins with a picture, or that continues another clip."
    GIVEN: ClassVar[dict[str, Any]] = {
        "images": ("IMAGE", {"tooltip": "one picture: the first frame; several pictures: a clip, which the result continues"})
    }

    OPTIONAL: ClassVar[dict[str, Any]] = {
        "last_image": ("IMAGE", {"tooltip": "the last frame of the clip, for models that take one"}),
        "interpolate": ("BOOLEAN", {
            "default": False, "tooltip": "make the frames between those of the clip, for models that can; num_frames has no effect"
        }),
        "views": ("BOOLEAN", {
            "default": False, "tooltip": "make views of the object in the picture, for models that can; num_frames has no effect"
        }),
    }  # fmt: skip

    def generate(
        self, model: VideoPipeline, images: Tensor, prompt: str, last_image: Tensor | None = None, interpolate: bool = False,
        views: bool = False, **options: Any,
    ) -> tuple[Tensor, float]:  # fmt: skip
        given = pixels(images)
        uses = {"image": given[0]} if len(given) == 1 else {"video": given}
        if last_image is not None:
            uses["last_image"] = pixels(last_image)[0]
        uses |= {"interpolate": 2 if interpolate else None, "views": views or None}
        if interpolate or views:
            options["num_frames"] = 0
        return make_clip(model, prompt, **uses, **pipeline_arguments(**options))


def pixels(images: Tensor) -> np.ndarray:
    """Return an IMAGE as an array [B, H, W, 3], or [B, H, W, 4] with opacity, in [0, 1]."""
    return images.float().clamp(0, 1).cpu().numpy()


DEFAULT = "default"


def unset(option: Option) -> int | str:
    """Return the value of an input that stands for the model's default.

    The option itself does not allow this value.
    """
    if option.kind in (FLAG, CHOICE):
        return DEFAULT
    return 0 if option.slider[0] > 0 else -1


def sampling_input(option: Option) -> tuple:
    """Return the ComfyUI input of a sampling option, as (type, properties)."""
    value, number = unset(option), int if option.kind == WHOLE else float
    if value == DEFAULT:
        names = option.choices if option.kind == CHOICE else ("true", "false")
        return ([DEFAULT, *names], {"default": DEFAULT, "tooltip": f"{option.meaning}; {DEFAULT}: the model's default"})
    return ("INT" if number is int else "FLOAT", {
        "default": number(value), "min": number(value), "max": number(option.most), "step": option.step,
        "tooltip": f"{option.meaning}; {value}: the model's default",
    })  # fmt: skip


def pipeline_arguments(*, negative_prompt: str, seed: int, **values: Any) -> dict[str, Any]:
    """Return the inputs of a node as arguments of the pipeline.

    An input with its unset value becomes None.
    """
    options = all_options()
    left = {name: unset(options[name]) if name in options else 0 for name in values}
    given = {name: None if value == left[name] else value for name, value in values.items()}
    given |= {name: value == "true" for name, value in given.items()
              if value is not None and name in options and options[name].kind == FLAG}  # fmt: skip
    return {"negative_prompt": negative_prompt, "seed": seed, **given}


def make_clip(pipe: VideoPipeline, prompt: str, **options: Any) -> tuple[Tensor, float]:
    """Make a clip and return it as IMAGE [T, H, W, 3] with its frames per second.

    The progress bar moves after each step. When frames are done it also shows the last picture of them.
    """
    encoded = pipe.encode(pipe.resolve(Request.of(prompt, **options)))
    resolved, frames, begun = encoded.resolved, [], 0
    steps_before = resolved.sampling.steps_before
    total = steps_before(resolved.new_frames)
    bar = comfy.utils.ProgressBar(total)

    def on_step(frame: int, new_frames: int, step: int, steps: int) -> None:
        nonlocal begun
        comfy.model_management.throw_exception_if_processing_interrupted()
        begun = frame + 1
        if step + 1 < steps:  # after the last step the loop below moves the bar and shows the frame
            bar.update_absolute(steps_before(frame) + step + 1, total)

    for (part,) in pipe.stream_encoded(encoded, on_step):
        frames.append(part)
        if begun:  # not before: these are given frames
            bar.update_absolute(steps_before(begun), total, ("JPEG", Image.fromarray(part[-1]), PREVIEW_PIXELS))
    return torch.from_numpy(np.concatenate(frames)).float() / 255, float(resolved.clip.fps)


NODE_CLASS_MAPPINGS = {
    "LumosLoader": LumosLoader,
    "LumosLoraLoader": LumosLoraLoader,
    "LumosTextToVideo": LumosTextToVideo,
    "LumosImageToVideo": LumosImageToVideo,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LumosLoader": "Load Lumos Model",
    "LumosLoraLoader": "Load Lumos LoRA",
    "LumosTextToVideo": "Lumos Text to Video",
    "LumosImageToVideo": "Lumos Image to Video",
}
