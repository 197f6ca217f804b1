"""Text encoders: ids of a prompt -> states for cross-attention, and one pooled state.

There are two kinds with the same interface. The small one is part of the model and is trained with it. The other
is a frozen encoder of transformers (CLIPTextModel, T5EncoderModel) from a folder. For both the pooled state is that
of the last token after the last layer, and the null text is the empty string through the same encoder.

Shapes: B batch, m text tokens, e width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumos.errors import UserError, reason_of, shown
from lumos.files import MAX_CONFIG_BYTES, read_json
from lumos.models.stiv.attention import StivAttention, StivRMSNorm
from lumos.models.stiv.configuration import HEAD_DIM, StivConfig
from lumos.models.stiv.rope import rotary, temporal_angles

KINDS = {"clip_text_model": "CLIPTextModel", "clip": "CLIPTextModel", "t5": "T5EncoderModel"}
"""Classes of transformers by the `model_type` of a text encoder's config."""


class TextIds(NamedTuple):
    """Prompts as ids, padded on the right: ids int64 [B, m], mask bool [B, m], True at tokens."""

    ids: Tensor
    mask: Tensor


class TextStates(NamedTuple):
    """Encoded prompts: states [B, m, e], mask bool [B, m], pooled [B, e]."""

    states: Tensor
    mask: Tensor
    pooled: Tensor

    def rows(self, of: Sequence[int] | Tensor) -> TextStates:
        """Return the rows `of` of all three tensors."""
        at = torch.as_tensor(of, device=self.mask.device)
        return TextStates(self.states[at], self.mask[at], self.pooled[at])


def text_ids(tokenizer, prompts: Sequence[str], config: StivConfig) -> TextIds:
    """Return the ids of prompts for the small text encoder: those of `tokenizer`, then one end mark.

    The empty string is the end mark alone. Raises UserError for a prompt over `config.max_prompt_tokens` tokens,
    and for ids outside the vocabulary of the encoder.
    """
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) + 1 > config.max_prompt_tokens:
            raise UserError(
                f"the prompt {shown(prompt, 60)} has {len(row)} tokens; allowed: at most {config.max_prompt_tokens - 1}; shorten it"
            )
        if row and max(row) >= config.text_vocab_size:
            raise UserError(
                f"the text tokenizer gives id {max(row)}; the text encoder has {config.text_vocab_size} ids: it was trained with "
                "another tokenizer; give the tokenizer of the model's folder"
            )
    return padded([[*row, config.text_vocab_size] for row in rows], config.text_vocab_size)


def padded(rows: Sequence[Sequence[int]], padding: int) -> TextIds:
    """Return rows of ids as one tensor, padded on the right, with its mask."""
    longest = max(map(len, rows), default=1)
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], dtype=torch.int64).reshape(len(rows), longest)
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    return TextIds(ids, mask)


def last_states(states: Tensor, mask: Tensor) -> Tensor:
    """Return the state of the last token of each row: states [B, m, e], mask [B, m] -> [B, e]."""
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)


class TextBlock(nn.Module):
    """One layer: causal attention and an MLP, each after a norm and with a residual connection."""

    def __init__(self, width: int):
        super().__init__()
        self.attention_norm = StivRMSNorm(width)
        self.attention = StivAttention(width)
        self.mlp_norm = StivRMSNorm(width)
        self.up_proj = nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, m, e] -> [B, m, e]."""
        x = x + self.attention(self.attention_norm(x), rotary=tables, causal=True)
        return x + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x)), approximate="tanh"))


class SmallTextEncoder(nn.Module):
    """A causal transformer over the ids of the project's text tokenizer; the last id is the end mark.

    Padding stands on the right, so no token attends to padding, and attention needs no mask.
    """

    def __init__(self, config: StivConfig):
        super().__init__()
        self.width = config.text_width
        self.embedding = nn.Embedding(config.text_vocab_size + 1, config.text_width)
        self.blocks = nn.ModuleList(TextBlock(config.text_width) for _ in range(config.text_layers))
        self.norm = StivRMSNorm(config.text_width)

    def forward(self, ids: Tensor, mask: Tensor) -> TextStates:
        """ids int64 [B, m], mask bool [B, m] -> states [B, m, e], mask, pooled [B, e]."""
        x = self.embedding(ids)
        tables = rotary(temporal_angles(ids.shape[1], 1.0, HEAD_DIM, ids.device), x.dtype)
        for block in self.blocks:
            x = block(x, tables)
        states = self.norm(x)
        return TextStates(states, mask, last_states(states, mask))

    encode = forward


class FrozenTextEncoder:
    """A text encoder of transformers with its tokenizer. Its weights are not trained."""

    def __init__(self, model: nn.Module, tokenizer, max_tokens: int):
        self.model, self.tokenizer, self.max_tokens = model.eval().requires_grad_(False), tokenizer, max_tokens
        self.width: int = getattr(model.config, "d_model", None) or model.config.hidden_size

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, width: int | None = None, max_tokens: int = 256) -> FrozenTextEncoder:
        """Load the encoder and the tokenizer of a folder as transformers writes them.

        width: the text width of the model that uses it; None: any.
        Raises UserError for a folder that is none, for another kind of model, and for another width.
        """
        import transformers

        place = Path(folder)
        kind = read_json(place / "config.json", "the config of a text encoder", MAX_CONFIG_BYTES)
        kind = kind.get("model_type") if isinstance(kind, dict) else None
        if not isinstance(kind, str) or kind not in KINDS:
            raise UserError(f"{folder} holds a model of type {shown(kind)}; a text encoder is one of {', '.join(KINDS)}")
        try:
            model = getattr(transformers, KINDS[kind]).from_pretrained(place)
            tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        except Exception as error:  # transformers raises errors of many types for damaged files
            raise UserError(f"the text encoder of {folder} cannot be loaded ({reason_of(error)}); copy it again") from error
        limit = min(max_tokens, getattr(model.config, "max_position_embeddings", None) or max_tokens)
        encoder = cls(model, tokenizer, limit)
        if width is not None and encoder.width != width:
            raise UserError(f"the text encoder of {folder} has width {encoder.width}; the model needs text_width {width}")
        return encoder

    def to(self, *args, **kwargs) -> FrozenTextEncoder:
        """Move or cast the weights as `torch.nn.Module.to` does."""
        self.model.to(*args, **kwargs)
        return self

    def text_ids(self, prompts: Sequence[str]) -> TextIds:
        """Return the ids of prompts, with the marks that the encoder's tokenizer adds. Raises UserError for a prompt too long."""
        rows = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > self.max_tokens:
                raise UserError(
                    f"the prompt {shown(prompt, 60)} has {len(row)} tokens; allowed: at most {self.max_tokens}; shorten it"
                )
        padding = self.tokenizer.pad_token_id
        return padded(rows, 0 if padding is None else padding)

    @torch.no_grad()
    def encode(self, ids: Tensor, mask: Tensor) -> TextStates:
        """ids int64 [B, m], mask bool [B, m] -> states [B, m, e], mask, pooled [B, e]."""
        device = next(self.model.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return TextStates(states, mask, last_states(states, mask))
