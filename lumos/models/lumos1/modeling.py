"""The decoder of Lumos-1.

- It has Llama's blocks: RMSNorm before attention and MLP, SwiGLU, grouped-query attention, no biases,
  and a head that is not tied to the embedding.
- QK-norm is a LayerNorm with weight and bias over the channels of a head, before RoPE (Chameleon).
- MM-RoPE gives 3-D positions to video tokens and the original 1-D positions to text (rope.py).
- Attention is frame-causal and needs no mask tensor (attention.py). It is an argument of the layers, so
  that generation can pass an attention with its cache.
- The head computes the loss, from supervised positions only. Full logits exist only without targets.
- Activation checkpointing saves the input and the attention output of each layer and recomputes the rest.
- Positions and frame spans follow from the ids, so `model(input_ids)` is a complete call.

Shapes: B batch, L sequence, H heads, D head channels, C hidden channels, V vocabulary, N supervised positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import AutoModel
from transformers.utils import ModelOutput

from lumos.compression.prunable import PrunableStack
from lumos.files import updating_folder
from lumos.lora import check_no_adapter
from lumos.models.lumos1.attention import Attend, attention_for, save_attention_outputs
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.conversion import prepare_checkpoint
from lumos.models.lumos1.loss import chunked_cross_entropy
from lumos.models.lumos1.rope import apply_rotary, position_ids, rotary_tables
from lumos.models.lumos1.sequence import SequenceLayout, content_mask, frame_times, parse_layout
from lumos.models.lumos1.swiglu import SiluTimes, mlp_piece
from lumos.pipeline.placement import working_device

Rotary = tuple[Tensor, Tensor]  # cos, sin [B, 1, L, D]
MODEL_FILES = r"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?"  # files that `save_pretrained` writes
PRUNED_PARTS = {"attention": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")}
"""The parts of a layer that can be skipped, and their modules."""


@dataclass
class LumosOutput(ModelOutput):
    """The output of `LumosForVideoGeneration`.

    Without targets it holds logits [B, L, V]. With targets it holds the loss of each supervised position,
    in row-major order, and the mean of these losses; or the hidden states of these positions before the head.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    position_loss: Tensor | None = None  # fp32 [N]
    hidden: Tensor | None = None  # [N, C]
    row_index: Tensor | None = None  # int64 [N], row of each supervised position
    frame_index: Tensor | None = None  # int64 [N], latent frame of each supervised position


def take(x: Tensor, at: Tensor) -> Tensor:
    """Select positions of each row: x [B, L, C], at int64 [B, m] -> [B, m, C]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


class LumosRMSNorm(nn.Module):
    """x / rms(x) * weight, with statistics in fp32 (arXiv 1910.07467).

    Under autocast the output has the autocast dtype. Otherwise each of the matrix products that follow
    would cast it, and keep a copy of its own for the backward pass.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed, device = F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps), x.device.type
        return normed.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normed


class LumosHeadNorm(nn.Module):
    """LayerNorm over the channels of a head.

    As in the published checkpoints, each model-parallel group of heads has its own row of weight and bias.
    """

    def __init__(self, head_dim: int, shards: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shards, head_dim))
        self.bias = nn.Parameter(torch.zeros(shards, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, H, D] -> [B, L, H, D]."""
        if len(self.weight) == 1:
            return F.layer_norm(x, x.shape[-1:], self.weight[0].to(x.dtype), self.bias[0].to(x.dtype), eps=1e-5)
        repeats = x.shape[2] // self.weight.shape[0]
        weight, bias = (p.repeat_interleave(repeats, dim=0) for p in (self.weight, self.bias))
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * weight + bias


class LumosAttention(nn.Module):
    """Grouped-query attention with QK-norm and rotary positions."""

    def __init__(self, config: LumosConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, kv_size, bias=False)
        self.v_proj = nn.Linear(size, kv_size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.q_norm = LumosHeadNorm(config.head_dim, config.model_parallel_size)
        self.k_norm = LumosHeadNorm(config.head_dim, config.model_parallel_size)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, at: Tensor | None = None) -> Tensor:
        """x [B, L, C] -> [B, L, C], or [B, m, C] if `at`, int64 [B, m], selects the tokens with queries."""
        queries, turned = (x, rotary) if at is None else (take(x, at), tuple(take(t[:, 0], at)[:, None] for t in rotary))
        q, k, v = (
            proj(of).unflatten(-1, (-1, self.head_dim))
            for proj, of in ((self.q_proj, queries), (self.k_proj, x), (self.v_proj, x))
        )
        q = apply_rotary(self.q_norm(q).transpose(1, 2), *turned).to(v.dtype)
        k = apply_rotary(self.k_norm(k).transpose(1, 2), *rotary).to(v.dtype)
        v = v.transpose(1, 2)
        return self.o_proj(attend(self.layer, q, k, v).transpose(1, 2).flatten(2))


class LumosMLP(nn.Module):
    """The MLP of a layer: SwiGLU (arXiv 2002.05202), computed in pieces to save memory."""

    def __init__(self, config: LumosConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[:-1].numel()
        piece = mlp_piece(tokens, torch.is_grad_enabled())
        # Compiled code fuses the intermediates, and a loop over pieces would be compiled for each number of pieces.
        if tokens <= piece or torch.compiler.is_compiling():
            return self._expand_and_contract(x)
        return torch.cat([self._expand_and_contract(part) for part in x.flatten(0, -2).split(piece)]).view(x.shape)

    def _expand_and_contract(self, x: Tensor) -> Tensor:
        return self.down_proj(SiluTimes.apply(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """One layer: attention and MLP, each after a norm and with a residual connection.

    skipped: the parts, "attention" or "mlp", that the forward pass leaves out.
    """

    skipped: frozenset[str] = frozenset()

    def __init__(self, config: LumosConfig, layer: int):
        super().__init__()
        self.input_layernorm = LumosRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LumosAttention(config, layer)
        self.post_attention_layernorm = LumosRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LumosMLP(config)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, at: Tensor | None = None) -> Tensor:
        """x [B, L, C] -> [B, L, C], or [B, m, C] with `at`.

        at: int64 [B, m], the tokens to compute; the other tokens contribute keys and values only. None: all.
        """
        stream = x if at is None else take(x, at)
        if "attention" not in self.skipped:
            stream = stream + self.self_attn(self.input_layernorm(x), rotary, attend, at)
        return stream if "mlp" in self.skipped else stream + self.mlp(self.post_attention_layernorm(stream))


class OutputHead(nn.Linear):
    """The output matrix [V, C]; video needs only its rows of visual codes.

    `forward` also computes the loss, because ZeRO-3 gathers the weight only inside `forward`.
    """

    def __init__(self, config: LumosConfig):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.first_row, self.rows = config.visual_token_start, config.visual_token_count
        self.chunk = config.loss_chunk_size

    def forward(self, hidden: Tensor, targets: Tensor | None = None, visual_only: bool = False) -> Tensor:
        """hidden [..., C] -> logits [..., V], or [..., number of visual codes] if `visual_only`.

        With targets, int64 [N] of visual codes: hidden [N, C] -> losses fp32 [N].
        """
        if targets is not None:
            return chunked_cross_entropy(
                hidden, self.weight, targets, first_row=self.first_row, rows=self.rows, chunk=self.chunk
            )
        weight = self.weight[self.first_row : self.first_row + self.rows] if visual_only else self.weight
        return F.linear(hidden, weight)


class LumosPreTrainedModel(PreTrainedModel):
    """The base of the models, with what transformers needs: config, initialisation and device."""

    config_class = LumosConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer",)
    _keys_to_ignore_on_load_unexpected = (r"^model\.vqmodel\.",)

    @property
    def device(self) -> torch.device:
        """The device of the computation. With a device_map, weights may be stored on other devices."""
        return working_device(self) if hasattr(self, "hf_device_map") else super().device

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, LumosRMSNorm | LumosHeadNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, LumosHeadNorm):
                nn.init.zeros_(module.bias)


class LumosModel(LumosPreTrainedModel):
    """The embedding, the layers and the last norm: it maps ids, positions and an attention to hidden states."""

    def __init__(self, config: LumosConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LumosRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids: Tensor, rotary: Rotary, attend: Attend, at: Tensor | None = None) -> Tensor:
        """Return the hidden states [B, L, C] after the last norm.

        Args:
            input_ids: [B, L].
            rotary: rotary tables of the positions, from `LumosForVideoGeneration.rotary`.
            attend: the attention of each layer.
            at: int64 [B, m], the tokens whose hidden states [B, m, C] are returned; None: all. The last
                layer computes queries for these tokens only. Gradient checkpointing ignores it.

        Layers whose parts are all skipped do not run.
        """
        x = self.embed_tokens(input_ids)
        contexts = save_attention_outputs if self.config.attention == "segmented" else noop_context_fn
        layers = [layer for layer in self.layers if layer.skipped != PRUNED_PARTS.keys()]
        for layer in layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, rotary, attend, use_reentrant=False, context_fn=contexts)
            else:
                x = layer(x, rotary, attend, at if layer is layers[-1] else None)
        return self.norm(x if layers or at is None else take(x, at))


class LumosForVideoGeneration(PrunableStack, LumosPreTrainedModel):
    """The decoder with its head. `from_pretrained` reads saved folders and released Lumos-1 folders."""

    stack, parts, mlp_width = "model.layers", PRUNED_PARTS, "intermediate_size"
    unit_kinds: ClassVar[dict[str, bool]] = {"layer": True, "attention": False, "mlp": False}
    mlp_channels: ClassVar[dict[str, int]] = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1}

    def __init__(self, config: LumosConfig):
        super().__init__(config)
        self.model = LumosModel(config)
        self.lm_head = OutputHead(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> LumosForVideoGeneration:
        """Load a model as in transformers, after a check of the folder.

        Raises UserError, which names missing files and tensors, if the folder is incomplete or damaged.
        """
        name, kwargs = prepare_checkpoint(pretrained_model_name_or_path, cls, kwargs)
        with no_init_weights():  # every tensor is in the folder; random values of the meta device import torch's compiler
            return super().from_pretrained(name, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """Write a model folder as in transformers.

        If the process is killed, the folder holds the old model or the new one, never a part. Other files
        of the folder are kept.
        """
        if kwargs.get("push_to_hub") or not is_main_process:
            super().save_pretrained(save_directory, is_main_process, **kwargs)
            return
        check_no_adapter(save_directory)
        with updating_folder(save_directory, re.compile(MODEL_FILES).fullmatch) as writing:
            super().save_pretrained(writing, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        targets: Tensor | None = None,
        layouts: list[SequenceLayout] | None = None,
        with_loss: bool = True,
    ) -> LumosOutput:
        """Return logits [B, L, V], or the loss if there are targets.

        The loss is the cross-entropy over the visual codes. The target of a position is the code at that
        same position, not at the next one.

        Args:
            input_ids: [B, L], padded on the right.
            attention_mask: [B, L], 0 at padding; it has no other effect.
            targets: [B, L], the visual code of a supervised position, else -100.
            layouts: the frame spans of each row, if they are known. Reading them from the ids makes the
                host wait for the GPU.
            with_loss: False returns the hidden states of the positions with a target, in place of their losses.

        Raises ValueError for incomplete frames, for padding on the left, and for targets out of range.
        """
        if targets is None:
            return LumosOutput(logits=self.lm_head(self.hidden_states(input_ids, attention_mask, layouts)[0]))
        rows, columns = (targets != -100).nonzero(as_tuple=True)  # first: the host waits for the GPU here
        wanted = targets[rows, columns]
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < self.config.visual_token_count:
            raise ValueError(
                f"targets run from {int(wanted.min())} to {int(wanted.max())}; allowed: visual codes 0 to "
                f"{self.config.visual_token_count - 1}, and -100"
            )
        hidden, layouts = self.hidden_states(input_ids, attention_mask, layouts)
        frames = frame_times(layouts, input_ids.shape[1]).to(input_ids.device)[rows, columns]
        if not with_loss:
            return LumosOutput(hidden=hidden[rows, columns], row_index=rows, frame_index=frames)
        loss = self.lm_head(hidden[rows, columns], targets=wanted)
        return LumosOutput(loss=loss.mean(), position_loss=loss, row_index=rows, frame_index=frames)

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, layouts: list[SequenceLayout] | None = None
    ) -> tuple[Tensor, list[SequenceLayout]]:
        """Return the hidden states [B, L, C] before the head, and the frame spans of each row.

        The arguments, and the errors for them, are those of `forward`.
        """
        layouts = layouts or self.layouts(input_ids, attention_mask)
        length, device = input_ids.shape[1], input_ids.device
        rotary = self.rotary(position_ids(layouts, length, self.config), content_mask(layouts, length))
        return self.model(input_ids, rotary, attention_for(self.config.attention, layouts, length, device)), layouts

    def layouts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[SequenceLayout]:
        """Return the frame spans of each row, which are read from the ids. The errors are those of `forward`."""
        if attention_mask is not None:
            mask = attention_mask.bool()
            if (mask[:, 1:] & ~mask[:, :-1]).any():
                raise ValueError("attention_mask has padding before tokens; sequences must be padded on the right")
            input_ids = input_ids.masked_fill(~mask, self.config.pad_token_id)
        return parse_layout(input_ids, self.config)

    def rotary(self, positions: Tensor, is_content: Tensor) -> Rotary:
        """Return the rotary tables (cos, sin) for `self.model`, in the dtype of the weights.

        positions: int64 [B, 3, L]. is_content: bool [B, L], True for codes and newlines of frames.
        """
        return rotary_tables(positions.to(self.device), is_content.to(self.device), self.config, self.dtype)

    def kv_bytes_per_token(self) -> int:
        """Return the bytes of keys and values of one token in the cache, over all layers."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.dtype.itemsize


COMPILED = (LumosMLP, LumosRMSNorm, LumosHeadNorm)
"""The modules that `compile` compiles. Attention and the cache are not compiled."""

AutoModel.register(LumosConfig, LumosForVideoGeneration)
