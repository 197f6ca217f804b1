"""Narrower decoders: every level keeps the channels whose filters have the largest L2 norm.

Channels form groups. All layers that read or write a group keep the same of its channels: for example, the convolutions that
add to one stream of states, and the norms and convolutions that read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lumos.errors import UserError, shown


def strongest(weights: Sequence[tuple[Tensor, int]], count: int) -> Tensor:
    """Return which `count` channels have the largest L2 norm over all weights, ascending, int64 [count].

    weights: pairs of a weight and the axis of the channels in it. On the meta device the first channels are returned.
    """
    if weights[0][0].is_meta:
        return torch.arange(count)
    total = sum(weight.double().movedim(axis, 0).flatten(1).square().sum(1) for weight, axis in weights)
    return total.topk(count).indices.sort().values


def check_narrower(sizes: Mapping[str, int], width: Mapping[str, int]) -> None:
    """Raise UserError unless each size is known and is a whole number from 1 to below that in `width`."""
    for name, size in sizes.items():
        if name not in width:
            allowed = f"allowed: {', '.join(width)}" if width else "this network has none"
            raise UserError(f"size {shown(name)} cannot be made smaller; {allowed}")
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < width[name]:
            raise UserError(f"{name} {shown(size)} is not allowed; give a whole number from 1 to {width[name] - 1}")


class ChannelGroup:
    """Channels that several layers share, of which `count` stay."""

    def __init__(self, count: int):
        self.count = count
        self.writers: list[Tensor] = []

    def kept(self) -> Tensor:
        """Return the channels that stay."""
        return strongest([(weight, 0) for weight in self.writers], self.count)


class Walk:
    """The layers of a decoder, in the order of execution, with the groups that they read and write.

    decoder: the network. state: its weights by name. widths: new numbers of channels of its levels.
    """

    def __init__(self, decoder: Any, state: Mapping[str, Tensor], widths: Sequence[int]):
        self.state = state
        # prefix, channels read and written; None: all stay
        self.convolutions: list[tuple[str, ChannelGroup | None, ChannelGroup | None]] = []
        self.norms: list[tuple[str, ChannelGroup]] = []
        stream = ChannelGroup(widths[-1])
        self.conv("conv_in", None, stream)
        if hasattr(decoder, "mid"):
            self.block("mid.block_1", stream, stream)
            self.attention("mid.attn_1", stream)
            self.block("mid.block_2", stream, stream)
        for i, level in reversed(list(enumerate(decoder.up))):
            for j in range(len(level.block)):
                before = stream
                if f"up.{i}.block.{j}.nin_shortcut.conv3d.weight" in state:
                    stream = ChannelGroup(widths[i])
                self.block(f"up.{i}.block.{j}", before, stream)
                if len(level.attn):
                    self.attention(f"up.{i}.attn.{j}", stream)
            if hasattr(level, "upsample"):
                stream = self.sampler(f"up.{i}.upsample", level.upsample, stream, widths[i])
        self.norms.append(("norm_out", stream))
        self.conv("conv_out", stream, None)

    def conv(self, prefix: str, read: ChannelGroup | None, written: ChannelGroup | None) -> None:
        """Add a convolution, or a spatial and a temporal one behind each other."""
        if f"{prefix}.1.conv3d.weight" not in self.state:
            self.point(prefix, read, written)
            return
        inner = None if written is None else ChannelGroup(written.count)
        self.point(f"{prefix}.0", read, inner)
        self.point(f"{prefix}.1", inner, written)

    def point(self, prefix: str, read: ChannelGroup | None, written: ChannelGroup | None) -> None:
        """Add a single convolution, if the network has it."""
        if f"{prefix}.conv3d.weight" in self.state:
            self.convolutions.append((prefix, read, written))
            if written is not None:
                written.writers.append(self.state[f"{prefix}.conv3d.weight"])

    def block(self, prefix: str, read: ChannelGroup, written: ChannelGroup) -> None:
        inner = ChannelGroup(written.count)
        self.norms += [(f"{prefix}.norm1", read), (f"{prefix}.norm2", inner)]
        self.conv(f"{prefix}.conv1", read, inner)
        self.conv(f"{prefix}.conv2", inner, written)
        self.point(f"{prefix}.nin_shortcut", read, written)

    def attention(self, prefix: str, stream: ChannelGroup) -> None:
        for part in (f"{prefix}.0", f"{prefix}.1"):
            compared, passed = ChannelGroup(stream.count), ChannelGroup(stream.count)
            self.norms.append((f"{part}.norm", stream))
            for name, read, written in (
                ("q", stream, compared), ("k", stream, compared), ("v", stream, passed), ("proj_out", passed, stream),
            ):  # fmt: skip
                self.point(f"{part}.{name}", read, written)

    def sampler(self, prefix: str, sampler: Any, stream: ChannelGroup, width: int) -> ChannelGroup:
        """Add a sampler, and return the group behind it. An idle one writes nothing that anything reads."""
        behind = ChannelGroup(width)
        idle = not (sampler.spatial or sampler.temporal)
        for name, written in (("conv1", stream), ("conv2", stream), ("conv3", behind)):
            self.point(f"{prefix}.{name}", stream, behind if idle else written)
        return stream if idle else behind

    def narrowed(self) -> dict[str, Tensor]:
        """Return the weights with the channels that stay."""
        kept: dict[ChannelGroup, Tensor] = {}

        def cut(tensor: Tensor, axis: int, group: ChannelGroup | None) -> Tensor:
            if group is None:
                return tensor
            if group not in kept:
                kept[group] = group.kept()
            return tensor.index_select(axis, kept[group].to(tensor.device))

        state = {}
        for prefix, read, written in self.convolutions:
            weight, bias = (f"{prefix}.conv3d.{name}" for name in ("weight", "bias"))
            state[weight] = cut(cut(self.state[weight], 0, written), 1, read)
            state[bias] = cut(self.state[bias], 0, written)
        for prefix, group in self.norms:
            for name in ("weight", "bias"):
                state[f"{prefix}.norm.{name}"] = cut(self.state[f"{prefix}.norm.{name}"], 0, group)
        return state
