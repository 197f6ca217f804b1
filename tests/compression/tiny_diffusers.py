"""Tiny random models of diffusers, their inputs, and plain forms of a model with units skipped."""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lumos.compression.diffusers_models import load

SVD = "UNetSpatioTemporalConditionModel"
MODELSCOPE = "UNet3DConditionModel"
UNETS = (SVD, MODELSCOPE)
COUNTS = {
    "HunyuanVideoTransformer3DModel": {"transformer_blocks": 4, "single_transformer_blocks": 5},
    "WanTransformer3DModel": {"blocks": 6},
    "CogVideoXTransformer3DModel": {"transformer_blocks": 6},
    "LTXVideoTransformer3DModel": {"transformer_blocks": 6},
}
TRANSFORMERS = tuple(COUNTS)
CONFIGS: dict[str, dict[str, Any]] = {
    SVD: {
        "block_out_channels": (32, 64, 64, 64), "num_attention_heads": (2, 2, 4, 4), "cross_attention_dim": 16,
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24,
    },
    MODELSCOPE: {"block_out_channels": (16, 32, 48, 48), "norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": 16},
    "HunyuanVideoTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10,
        "num_layers": 4, "num_single_layers": 5,
        "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
    },
    "WanTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
        "freq_dim": 32, "ffn_dim": 32,
        "num_layers": 6, "rope_max_seq_len": 32,
    },
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 6, "sample_width": 8, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 5,
    },
    "LTXVideoTransformer3DModel": {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8,
        "cross_attention_dim": 16, "num_layers": 6,
        "caption_channels": 16,
    },
}  # fmt: skip
FRAMES = 3


def make(name: str, seed: int = 0, **changed: Any) -> nn.Module:
    """Return a model in eval mode with random weights, also where its class starts with zeros."""
    import diffusers

    torch.manual_seed(seed)
    model = getattr(diffusers, name)(**(CONFIGS[name] | changed)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def saved(folder: Path, name: str, **changed: Any) -> Path:
    """The folder of such a model."""
    make(name, **changed).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> nn.Module:
    """The model of a folder, with its weights copied to aligned memory.

    `from_pretrained` leaves them in the mapped file, where kernels may round otherwise: by up to 2e-6 here,
    also between a model and its own copy.
    """
    return aligned(load(folder)).eval()


def aligned(model: nn.Module) -> nn.Module:
    """Copy a model's weights to memory of their own, which `copy.deepcopy` of all its modules would do in ten times the time."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def inputs(name: str, clips: int = 2) -> dict[str, Any]:
    """Keyword arguments of a forward pass, for clips of FRAMES latent frames of 8 x 8 (4 x 4 for LTX)."""
    g = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    text = noise(clips, 5, 16)
    if name == SVD:
        return {"sample": noise(clips, FRAMES, 8, 8, 8), "timestep": 3, "encoder_hidden_states": noise(clips, 1, 16),
                "added_time_ids": noise(clips, 3).abs()}  # fmt: skip
    if name == MODELSCOPE:
        return {"sample": noise(clips, 4, FRAMES, 8, 8), "timestep": 3, "encoder_hidden_states": text}
    time = torch.tensor([3.0, 700.0][:clips])
    if name == "HunyuanVideoTransformer3DModel":
        return {"hidden_states": noise(clips, 4, FRAMES, 8, 8), "timestep": time, "encoder_hidden_states": text,
                "encoder_attention_mask": torch.ones(clips, 5), "pooled_projections": noise(clips, 8),
                "guidance": torch.full((clips,), 6000.0)}  # fmt: skip
    if name == "WanTransformer3DModel":
        return {"hidden_states": noise(clips, 4, FRAMES, 8, 8), "timestep": time, "encoder_hidden_states": text}
    if name == "CogVideoXTransformer3DModel":
        return {"hidden_states": noise(clips, FRAMES, 4, 8, 8), "timestep": time, "encoder_hidden_states": text}
    return {"hidden_states": noise(clips, FRAMES * 16, 8), "timestep": time, "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(clips, 5), "num_frames": FRAMES, "height": 4, "width": 4}  # fmt: skip


@torch.no_grad()
def output(model: nn.Module, name: str) -> Tensor:
    return model(**inputs(name), return_dict=False)[0]


@contextmanager
def blocks_skipped(model: nn.Module, units: Collection[str]):
    """Within the block, blocks of a transformer return their input."""
    def same(_, args, kwargs, out):
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(out, tuple):
            return hidden
        return hidden, kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)

    with ExitStack() as stack:
        for unit in units:
            stack.callback(model.get_submodule(unit).register_forward_hook(same, with_kwargs=True).remove)
        yield


class PlainBlock(nn.Module):
    """Run a down or up block of a U-Net as a plain loop over the slots that are not removed."""

    def __init__(self, block: nn.Module, name: str, removed: Collection[str], reduced: Collection[str], sampler: bool = True):
        super().__init__()
        self.block, self.has_cross_attention, self.sampler = block, True, sampler
        self.slots = [k for k in range(len(block.resnets)) if f"{name}.{k}" not in removed]
        self.resnets = self.slots  # the U-Net asks for its length
        self.reduced = {k for k in self.slots if f"{name}.{k}" in reduced}

    def forward(self, hidden_states, temb, res_hidden_states_tuple=None, upsample_size=None, encoder_hidden_states=None,
                image_only_indicator=None, num_frames=None, **_):  # fmt: skip
        block, x, pushed = self.block, hidden_states, []
        skips = list(res_hidden_states_tuple or ())
        for k in self.slots:
            if res_hidden_states_tuple is not None:
                x = torch.cat([x, skips.pop()], 1)
            resnet = block.resnets[k]
            if k in self.reduced:
                shortcut = getattr(resnet, "spatial_res_block", resnet).conv_shortcut
                x = x if shortcut is None else shortcut(x)
            elif image_only_indicator is not None:
                x = resnet(x, temb, image_only_indicator=image_only_indicator)
                if hasattr(block, "attentions"):
                    x = block.attentions[k](x, encoder_hidden_states=encoder_hidden_states,
                                            image_only_indicator=image_only_indicator).sample  # fmt: skip
            else:
                x = block.temp_convs[k](resnet(x, temb), num_frames=num_frames)
                if hasattr(block, "attentions"):
                    x = block.attentions[k](x, encoder_hidden_states=encoder_hidden_states).sample
                    x = block.temp_attentions[k](x, num_frames=num_frames).sample
            pushed.append(x)
        if res_hidden_states_tuple is not None:
            return block.upsamplers[0](x, upsample_size) if block.upsamplers is not None else x
        if block.downsamplers is not None and self.sampler:
            x = block.downsamplers[0](x)
            pushed.append(x)
        return x, tuple(pushed)


class Same(nn.Module):
    def forward(self, hidden_states, *_, **__):
        return hidden_states


def unet_skipping(unet: nn.Module, remove: Collection[str], reduced: Collection[str] = (), stages: int | None = None) -> nn.Module:
    """Run the teacher without some units, by plain loops over its first `stages` stages."""
    unet = copy.copy(unet)
    unet._modules = dict(unet._modules)  # its blocks are replaced, and those of the teacher stay
    total = len(unet.down_blocks)
    stages = stages or total
    removed = set(remove) - set(reduced)
    if "mid_block" in removed:
        unet.mid_block = Same()
    unet.down_blocks = nn.ModuleList(
        PlainBlock(unet.down_blocks[b], f"down_blocks.{b}", removed, reduced, sampler=b < stages - 1) for b in range(stages)
    )
    unet.up_blocks = nn.ModuleList(
        PlainBlock(unet.up_blocks[b], f"up_blocks.{b}", removed, reduced) for b in range(total - stages, total)
    )
    unet.num_upsamplers = stages - 1
    return unet
