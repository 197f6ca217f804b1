"""Smaller decoders: units of a tokenizer's decoder are skipped or removed, and its levels are made narrower.

The encoder stays as it is, so a tokenizer with a smaller decoder makes the same codes. The methods are those that
`lumos.compression.prunable.Prunable` describes. Units:

    mid         the middle: two residual blocks with attention between them
    up.2.0      residual block 0 of level 2, with its attention if the level has any; the decoder runs from the last level to
                level 0. A block that changes the number of channels is no unit.
    idle        samplers and convolutions that no pixel depends on
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lumos.errors import UserError, shown
from tokenizer.fingerprint import same_codes_as
from tokenizer.narrowing import Walk, check_narrower


class PrunableDecoder:
    """The part of `VideoTokenizer` that makes its decoder smaller."""

    unit_kinds: ClassVar[dict[str, bool]] = {"block": True, "idle": True}
    stream_axis: ClassVar[int] = 1

    @property
    def width(self) -> dict[str, int]:
        """The sizes that `narrowed` makes smaller."""
        return {} if self.config.is_image else {"decoder_channels": self.config.decoder_channels or self.config.channels}

    def units(self, kind: str | None = None) -> dict[str, tuple[str, ...]]:
        """Return {name: names of the parameters} of the units of a kind, "block" or "idle", in the order of execution."""
        if kind not in (None, *self.unit_kinds):
            raise UserError(f"units {shown(kind)} are unknown; allowed: {', '.join(self.unit_kinds)}")
        names = [name for name, _ in self.named_parameters()]
        if kind == "idle":
            if not self.config.decoder_idle:
                return {}
            with torch.device("meta"):
                used = type(self.decoder)(dataclasses.replace(self.config, decoder_idle=False)).state_dict()
            idle = tuple(name for name in names if name.startswith("decoder.") and name.removeprefix("decoder.") not in used)
            return {"idle": idle} if idle else {}
        found = {}
        for unit, modules in self._places().items():
            if owned := tuple(name for name in names if name.startswith(tuple(f"{module}." for module in modules))):
                found[unit] = owned
        return found

    def _places(self) -> dict[str, tuple[str, ...]]:
        """Return {unit: names of its modules}, without idle parts."""
        decoder, found = self.decoder, {}
        if self.config.decoder_mid:
            found["mid"] = ("decoder.mid",)
        for i, level in reversed(list(enumerate(decoder.up))):
            for j, block in enumerate(level.block):
                if isinstance(block.nin_shortcut, nn.Identity):
                    attention = (f"decoder.up.{i}.attn.{j}",) if len(level.attn) else ()
                    found[f"up.{i}.{j}"] = (f"decoder.up.{i}.block.{j}", *attention)
        return found

    def stages(self) -> dict[str, tuple[nn.Module, ...]]:
        """Return {name: modules} of all that the stream of the decoder goes through, samplers included."""
        decoder, found = self.decoder, {}
        if self.config.decoder_mid:
            found["mid"] = (decoder.mid,)
        for i, level in reversed(list(enumerate(decoder.up))):
            for j, block in enumerate(level.block):
                found[f"up.{i}.{j}"] = (block, *level.attn[j : j + 1])
            if hasattr(level, "upsample"):
                found[f"up.{i}.upsample"] = (level.upsample,)
        return found

    def named_plans(self) -> dict[str, tuple[str, ...]]:
        """Return the plan of VDMini: the middle, and the blocks at the level next to the pixels (arXiv 2411.18375, appendix A)."""
        return {"shallow": tuple(name for name in self.units() if name == "mid" or name.startswith("up.0."))}

    @contextmanager
    def skipping(self, names: Collection[str]) -> Iterator[None]:
        """Skip blocks within the block of code: the stream behind a skipped block is the stream before it."""
        self._check(names)
        decoder = self.decoder
        before = decoder.skips_middle, [level.skipped for level in decoder.up]
        for name in names:
            if name == "mid":
                decoder.skips_middle = True
            elif name != "idle":
                _, level, block = name.split(".")
                decoder.up[int(level)].skipped |= {int(block)}
        try:
            yield
        finally:
            decoder.skips_middle = before[0]
            for level, skipped in zip(decoder.up, before[1], strict=True):
                level.skipped = skipped

    def without(self, names: Collection[str]) -> Self:
        """Return a tokenizer without these units of the decoder. It shares the weights that stay. UserError for unknown units."""
        self._check(names)
        state, counts = dict(self.state_dict()), list(self.config.decoder_blocks)
        changes: dict[str, object] = {}
        if "mid" in names:
            changes["decoder_mid"] = False
            state = {name: tensor for name, tensor in state.items() if not name.startswith("decoder.mid.")}
        for i, level in enumerate(self.decoder.up):
            kept = [j for j in range(len(level.block)) if f"up.{i}.{j}" not in names]
            counts[i] = len(kept)
            for part in ("block", "attn") if len(kept) < len(level.block) else ():
                prefix = f"decoder.up.{i}.{part}."
                old = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
                for after, before in enumerate(kept):
                    state |= {f"{prefix}{after}.{name.removeprefix(f'{prefix}{before}.')}": tensor
                              for name, tensor in old.items() if name.startswith(f"{prefix}{before}.")}  # fmt: skip
        if "idle" in names:
            changes["decoder_idle"], idle = False, set(self.units("idle")["idle"])
            state = {name: tensor for name, tensor in state.items() if name not in idle}
        if tuple(counts) != self.config.decoder_blocks:
            changes["decoder_num_res_blocks"] = tuple(counts)
        return self._rebuilt(changes, state)

    def narrowed(self, sizes: Mapping[str, int]) -> Self:
        """Return a tokenizer whose decoder has fewer channels, sizes {"decoder_channels": n}; see `tokenizer.narrowing`.

        Raises UserError for another size, and for one that is not smaller.
        """
        check_narrower(sizes, self.width)
        if not sizes:
            return self
        state = {name.removeprefix("decoder."): weight for name, weight in self.decoder.state_dict().items()}
        widths = tuple(sizes["decoder_channels"] * mult for mult in self.config.decoder_mult)
        cut = {f"decoder.{name}": weight for name, weight in Walk(self.decoder, state, widths).narrowed().items()}
        return self._rebuilt(sizes, self.state_dict() | cut)

    def _check(self, names: Collection[str]) -> None:
        known = list(self.units())
        if not set(names) <= set(known):  # to find idle parts, a second decoder is built
            known += self.units("idle")
        for name in names:
            if name not in known:
                raise UserError(f"there is no unit {shown(name)}; the decoder has {', '.join(known)}")

    def _rebuilt(self, changes: Mapping[str, Any], state: Mapping[str, Tensor]) -> Self:
        """Return a tokenizer with a changed config and the weights `state`."""
        origin = {} if next(self.parameters()).is_meta else {"codes_of": same_codes_as(self)}
        with torch.device("meta"):
            made = type(self)(dataclasses.replace(self.config, **changes, **origin))
        made.load_state_dict(state, assign=True)
        return made.train(self.training).requires_grad_(next(self.parameters()).requires_grad)
