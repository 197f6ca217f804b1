"""The decoder, whole. What is notable in it:

- Llama's blocks: RMSNorm before attention and MLP, SwiGLU, grouped-query attention, no biases, untied head
- QK-norm: LayerNorm with weight and bias over the channels of a head, before RoPE (Chameleon)
- MM-RoPE: 3-D positions for video tokens, the original 1-D ones for text (lumos/models/lumos1/rope.py)
- frame-causal attention without a mask tensor (attention.py); `Attend` is handed in: generation puts its cache there
- the loss is computed inside the head from supervised positions only; full logits exist only if asked for
- activation checkpointing keeps each layer's input and attention output, and computes the rest again
- positions and frame spans are read off the ids, so `model(input_ids)` is all there is to call

Shapes: B batch, L sequence, H heads, D head channels, C hidden channels, V vocabulary, N supervised positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from lumos.files import updating_folder
from lumos.models.lumos1.attention import Attend, attention_for, attention_kept
from lumos.models.lumos1.configuration import LumosConfig
from lumos.models.lumos1.conversion import prepare_checkpoint
from lumos.models.lumos1.flops import layer_flops_per_token
from lumos.models.lumos1.loss import chunked_cross_entropy
from lumos.models.lumos1.rope import apply_rotary, position_ids, rotary_tables
from lumos.models.lumos1.sequence import Layout, content_mask, frame_indices, parse_layout
from lumos.pipeline.placement import working_device

Rotary = tuple[Tensor, Tensor]  # cos, sin [B, 1, L, D]
MODEL_FILES = r"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?"  # names of what `save_pretrained` writes
MLP_TOKENS = 1024  # an MLP takes so many tokens at a time, with gradients a quarter of them if that is more


@dataclass
class LumosOutput(ModelOutput):
    """logits [B, L, V] without targets; with targets the loss of each supervised position, row-major, and its mean."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    position_loss: Tensor | None = None  # fp32 [N]
    row_index: Tensor | None = None  # int64 [N], row of each
    frame_index: Tensor | None = None  # int64 [N], latent frame of each


def take(x: Tensor, at: Tensor) -> Tensor:
    """x [B, L, C], at int64 [B, m] -> [B, m, C]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


class RMSNorm(nn.Module):
    """x / rms(x) * weight; statistics are computed in fp32 (arXiv 1910.07467).

    Under autocast it gives the format of the products that follow, which would otherwise cast it, and keep that, each for itself.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed, device = F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps), x.device.type
        return normed.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normed


class HeadNorm(nn.Module):
    """LayerNorm over a head's channels. One (weight, bias) row for each model-parallel shard of heads, as published."""

    def __init__(self, head_dim: int, shards: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shards, head_dim))
        self.bias = nn.Parameter(torch.zeros(shards, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, H, D]."""
        if len(self.weight) == 1:
            return F.layer_norm(x, x.shape[-1:], self.weight[0].to(x.dtype), self.bias[0].to(x.dtype), eps=1e-5)
        repeats = x.shape[2] // self.weight.shape[0]
        weight, bias = (p.repeat_interleave(repeats, dim=0) for p in (self.weight, self.bias))
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * weight + bias


class Attention(nn.Module):
    def __init__(self, config: LumosConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, kv_size, bias=False)
        self.v_proj = nn.Linear(size, kv_size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.q_norm = HeadNorm(config.head_dim, config.model_parallel_size)
        self.k_norm = HeadNorm(config.head_dim, config.model_parallel_size)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, at: Tensor | None = None) -> Tensor:
        queries, turned = (x, rotary) if at is None else (take(x, at), tuple(take(t[:, 0], at)[:, None] for t in rotary))
        q, k, v = (
            proj(of).unflatten(-1, (-1, self.head_dim))
            for proj, of in ((self.q_proj, queries), (self.k_proj, x), (self.v_proj, x))
        )
        q = apply_rotary(self.q_norm(q).transpose(1, 2), *turned).to(v.dtype)
        k = apply_rotary(self.k_norm(k).transpose(1, 2), *rotary).to(v.dtype)
        v = v.transpose(1, 2)
        return self.o_proj(attend(self.layer, q, k, v).transpose(1, 2).flatten(2))


class SiluTimes(torch.autograd.Function):
    """silu(gate) * up, which keeps its two arguments alone for the backward pass: a layer's widest tensors, one fewer."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gate, up), (for_gate, for_up) = ctx.saved_tensors, ctx.needs_input_grad
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate) if for_gate else None
        return grad_gate, F.silu(gate).mul_(grad) if for_up else None


def mlp_piece(tokens: int, with_gradients: bool) -> int:
    """Tokens that an MLP takes at a time, of so many.

    Its intermediates are the widest tensors of a layer. A backward pass is done with one piece before it comes to the next, so the
    gradients of the intermediates exist for one piece only. More and smaller pieces would save little more.
    """
    return max(MLP_TOKENS, -(-tokens // 4)) if with_gradients else MLP_TOKENS


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LumosConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[:-1].numel()
        piece = mlp_piece(tokens, torch.is_grad_enabled())
        if tokens <= piece or torch.compiler.is_compiling():  # compiled code fuses them, and would be compiled for each piece
            return self._expand_and_contract(x)
        return torch.cat([self._expand_and_contract(part) for part in x.flatten(0, -2).split(piece)]).view(x.shape)

    def _expand_and_contract(self, x: Tensor) -> Tensor:
        return self.down_proj(SiluTimes.apply(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: LumosConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, at: Tensor | None = None) -> Tensor:
        """at: int64 [B, m], the tokens whose states are wanted; the others give keys and values only. Default: all."""
        attended = self.self_attn(self.input_layernorm(x), rotary, attend, at)
        x = (x if at is None else take(x, at)) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(nn.Linear):
    """The output matrix [V, C], of which video needs only the visual rows.

    Everything that reads the weight happens inside `forward`, where ZeRO-3 has gathered it.
    """

    def __init__(self, config: LumosConfig):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.first_row, self.rows = config.visual_token_start, config.visual_token_count
        self.chunk = config.loss_chunk_size

    def forward(self, hidden: Tensor, targets: Tensor | None = None, visual_only: bool = False) -> Tensor:
        """hidden [..., C] -> logits [..., V] or [..., visual codes]; with targets [N]: loss [N] of hidden [N, C]."""
        if targets is not None:
            return chunked_cross_entropy(
                hidden, self.weight, targets, first_row=self.first_row, rows=self.rows, chunk=self.chunk
            )
        weight = self.weight[self.first_row : self.first_row + self.rows] if visual_only else self.weight
        return F.linear(hidden, weight)


class LumosPreTrainedModel(PreTrainedModel):
    config_class = LumosConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer",)
    _keys_to_ignore_on_load_unexpected = (r"^model\.vqmodel\.",)

    @property
    def device(self) -> torch.device:
        """Where it computes; with a device_map, weights may wait elsewhere."""
        return working_device(self) if hasattr(self, "hf_device_map") else super().device

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm | HeadNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, HeadNorm):
                nn.init.zeros_(module.bias)


class LumosModel(LumosPreTrainedModel):
    """The stack of layers: ids, positions and an attention in, hidden states out."""

    def __init__(self, config: LumosConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, input_ids: Tensor, rotary: Rotary, attend: Attend, at: Tensor | None = None) -> Tensor:
        """input_ids [B, L], rotary tables of their positions -> hidden states [B, L, C] after the last norm.

        at: int64 [B, m], the tokens whose hidden states [B, m, C] are wanted: the last layer has no queries but theirs.
        """
        x = self.embed_tokens(input_ids)
        kept = attention_kept if self.config.attention == "segmented" else noop_context_fn
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, rotary, attend, use_reentrant=False, context_fn=kept)
            else:
                x = layer(x, rotary, attend, at if layer is self.layers[-1] else None)
        return self.norm(x)


class LumosForVideoGeneration(LumosPreTrainedModel):
    """Decoder and head. `from_pretrained` takes an own folder or a released Lumos-1 folder as it is."""

    def __init__(self, config: LumosConfig):
        super().__init__(config)
        self.model = LumosModel(config)
        self.lm_head = Head(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> LumosForVideoGeneration:
        """As in transformers, after a check of the folder: ValueError or FileNotFoundError names what is missing."""
        name, kwargs = prepare_checkpoint(pretrained_model_name_or_path, cls, kwargs)
        return super().from_pretrained(name, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """As in transformers. A kill leaves the older or the new model, and other files of the folder stay."""
        if kwargs.get("push_to_hub") or not is_main_process:
            super().save_pretrained(save_directory, is_main_process, **kwargs)
            return
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
        layouts: list[Layout] | None = None,
    ) -> LumosOutput:
        """input_ids [B, L], right-padded; attention_mask [B, L] only says where padding begins. `layouts` saves reading the frame
        spans off the ids, for which a GPU would wait.

        Without targets: logits [B, L, V]. With targets [B, L] (visual code, or -100 where nothing is asked):
        same-position cross-entropy over the visual codes. ValueError for cut frames and for padding on the left.
        """
        if targets is None:
            return LumosOutput(logits=self.lm_head(self.hidden_states(input_ids, attention_mask, layouts)[0]))
        rows, columns = (targets != -100).nonzero(as_tuple=True)  # all that a GPU must be waited for comes before its work
        wanted = targets[rows, columns]
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < self.config.visual_token_count:
            raise ValueError(
                f"targets run from {int(wanted.min())} to {int(wanted.max())}; allowed: visual codes 0 to "
                f"{self.config.visual_token_count - 1}, and -100"
            )
        hidden, layouts = self.hidden_states(input_ids, attention_mask, layouts)
        loss = self.lm_head(hidden[rows, columns], targets=wanted)
        frames = frame_indices(layouts, input_ids.shape[1]).to(input_ids.device)[rows, columns]
        return LumosOutput(loss=loss.mean(), position_loss=loss, row_index=rows, frame_index=frames)

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, layouts: list[Layout] | None = None
    ) -> tuple[Tensor, list[Layout]]:
        """input_ids [B, L] -> ([B, L, C] before the head, frame spans of each row); ValueError as in `forward`."""
        layouts = layouts or self.layouts(input_ids, attention_mask)
        length, device = input_ids.shape[1], input_ids.device
        rotary = self.rotary(position_ids(layouts, length, self.config), content_mask(layouts, length))
        return self.model(input_ids, rotary, attention_for(self.config.attention, layouts, length, device)), layouts

    def layouts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Layout]:
        """Frame spans of each row, read off the ids."""
        if attention_mask is not None:
            mask = attention_mask.bool()
            if (mask[:, 1:] & ~mask[:, :-1]).any():
                raise ValueError("attention_mask has padding before tokens; sequences must be padded on the right")
            input_ids = input_ids.masked_fill(~mask, self.config.pad_token_id)
        return parse_layout(input_ids, self.config)

    def rotary(self, positions: Tensor, is_content: Tensor) -> Rotary:
        """positions [B, 3, L], is_content bool [B, L] -> the tables that `model` takes, in the weights' dtype."""
        return rotary_tables(positions.to(self.device), is_content.to(self.device), self.config, self.dtype)

    def flops_per_token(self, context: int) -> int:
        """Multiply-adds x 2 of one token's forward through the layers with `context` keys in sight (no head)."""
        return int(layer_flops_per_token(self.config, context))

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token leaves in the cache."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.dtype.itemsize


AutoModel.register(LumosConfig, LumosForVideoGeneration)
