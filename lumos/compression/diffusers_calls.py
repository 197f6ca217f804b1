"""Calls of networks of diffusers with clips [B, C, T, h, w], and the form of the features of their blocks."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lumos.compression import transformers, unets
from lumos.errors import UserError

FRAMES_FIRST = ("UNetSpatioTemporalConditionModel", "CogVideoXTransformer3DModel")
"""Classes that read and return clips [B, T, C, h, w]."""
PACKED = ("LTXVideoTransformer3DModel",)
"""Classes that read and return tokens [B, T h w, C]."""
MASKED = ("LTXVideoTransformer3DModel", "HunyuanVideoTransformer3DModel")
"""Classes that need a mask of the text; without one in the folder all text counts."""
MASK = "encoder_attention_mask"
OWN = ("self", "sample", "hidden_states", "timestep", "encoder_hidden_states", "num_frames", "height", "width", "return_dict",
       "attention_kwargs", "cross_attention_kwargs")
"""Arguments that are made here, or are no tensors."""


@dataclass(frozen=True)
class NetworkCalls:
    """The calls of networks of one class.

    name    the class of diffusers; for a pruned class of `lumos.compression.unets` the one that it was made of
    config  of one of the networks
    """

    name: str
    config: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> NetworkCalls:
        """Return the calls of the network with this config.json."""
        return cls(config["_class_name"].removeprefix(unets.PREFIX), config)

    @property
    def is_unet(self) -> bool:
        return self.name in unets.CLASSES

    def check(self, model_class: type, latents: int, channels: int, inputs: Collection[str]) -> None:
        """Raise UserError if a network cannot read clips of a folder.

        latents: channels of the latents. channels: with those of the condition. inputs: names of further arguments.
        """
        config = self.config
        if config["in_channels"] != channels or (config.get("out_channels") or config["in_channels"]) != latents:
            raise UserError(
                f"the network reads {config['in_channels']} channels and returns {config.get('out_channels')}; the clips have "
                f"{latents} channels of latents and {channels - latents} of a condition"
            )
        if config.get("use_rotary_positional_embeddings"):
            raise UserError(f"{self.name} with rotary positions (CogVideoX-5b) cannot be trained on a folder of latents")
        known = inspect.signature(model_class.forward).parameters
        allowed = [name for name in known if name not in OWN]
        if unknown := sorted(set(inputs) - set(allowed)):
            raise UserError(f"the network has no argument {unknown[0]}; allowed under inputs: {', '.join(allowed)}")
        needed = [name for name in allowed if known[name].default is inspect.Parameter.empty and name != MASK]
        needed += ["guidance"] * bool(config.get("guidance_embeds"))
        if missing := [name for name in needed if name not in inputs]:
            raise UserError(
                f"the network needs {missing[0]}; give it as a tensor inputs.{missing[0]} of each clip, or in latents.json"
            )

    @property
    def patch(self) -> tuple[int, int]:
        """The frames and the side of a patch."""
        size = self.config.get("patch_size", 1)
        if self.is_unet:
            return 1, 1
        return (size[0], size[1]) if isinstance(size, (list, tuple)) else (self.config.get("patch_size_t") or 1, size)

    def arguments(self, x: Tensor, time: Tensor, text: Tensor, inputs: Mapping[str, Tensor | float]) -> dict[str, Any]:
        """Return the keyword arguments for noisy clips x [B, C, T, h, w] at times [B] with text states [B, L, D]."""
        frames, height, width = x.shape[2:]
        given = {name: x.new_full((len(x),), value) if isinstance(value, (int, float)) else value for name, value in inputs.items()}
        if self.name in MASKED and MASK not in given:
            given[MASK] = torch.ones(text.shape[:2], dtype=x.dtype, device=x.device)
        if self.name in PACKED:
            x = x.flatten(2).transpose(1, 2)
            given |= {"num_frames": frames, "height": height, "width": width}
        elif self.name in FRAMES_FIRST:
            x = x.transpose(1, 2)
        return {self.input: x, "timestep": time, "encoder_hidden_states": text, **given}

    @property
    def input(self) -> str:
        """The name of the argument with the noisy latents."""
        return "sample" if self.is_unet else "hidden_states"

    @property
    def latents(self) -> int:
        """The channels of a prediction, which are the first ones of the input."""
        return self.config.get("out_channels") or self.config["in_channels"]

    def clips(self, arguments: Mapping[str, Any]) -> Tensor:
        """Return the input of a call with these keyword arguments as clips [B, C, T, h, w], channels of a condition included."""
        x = arguments[self.input]
        if self.name in PACKED:
            return x.transpose(1, 2).unflatten(2, [arguments[name] for name in ("num_frames", "height", "width")])
        return x.transpose(1, 2) if self.name in FRAMES_FIRST else x

    def with_clips(self, arguments: Mapping[str, Any], latents: Tensor, time: Tensor) -> dict[str, Any]:
        """Return the arguments with other noisy latents [B, C, T, h, w] and times [B]; a condition stays as it is."""
        own = self.clips(arguments)
        x = torch.cat([latents.to(own.dtype), own[:, latents.shape[1] :]], dim=1)
        if self.name in PACKED:
            x = x.flatten(2).transpose(1, 2)
        elif self.name in FRAMES_FIRST:
            x = x.transpose(1, 2)
        return {**arguments, self.input: x, "timestep": time}

    def as_clips(self, prediction: Tensor, shape: torch.Size) -> Tensor:
        """Return a prediction as [B, C, T, h, w]. shape: that of the clips."""
        if self.name in PACKED:
            return prediction.transpose(1, 2).unflatten(2, shape[2:])
        return prediction.transpose(1, 2) if self.name in FRAMES_FIRST else prediction

    def features(self, output: Any, shape: torch.Size) -> Tensor:
        """Return the output of a block as [B, T, h, w, C]. shape: that of the clips; T, h and w are those of the block."""
        output = output[0] if isinstance(output, tuple) else output
        frames, side = self.patch
        if output.ndim == 4:  # [B T, C, h, w]
            return output.unflatten(0, (shape[0], -1)).movedim(2, -1)
        return output.unflatten(1, (shape[2] // frames, shape[3] // side, shape[4] // side))

    def blocks(self) -> list[str]:
        """Return the names of the blocks in the order of execution: of a U-Net, its down blocks."""
        if self.is_unet:
            return [f"down_blocks.{i}" for i in range(len(self.config["down_block_types"]))]
        counts = transformers.BLOCKS[self.name]
        return [f"{name}.{i}" for name, count in counts.items() for i in range(self.config[count])]

    def channels(self, block: str) -> int:
        """Return the channels behind one of these blocks."""
        if self.is_unet:
            return self.config["block_out_channels"][int(block.rpartition(".")[2])]
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]
