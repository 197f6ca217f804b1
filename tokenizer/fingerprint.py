"""Fingerprints of video tokenizers and other networks, which tell whether codes or states were made by that network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

ENCODER = ("encoder.", "quant_conv.")
"""Prefixes of the weights that decide the codes."""


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Return the fingerprint of a video tokenizer, its number of codes and its compression.

    Codes fit a tokenizer if all four values are the same as those of the tokenizer that made them.
    The fingerprint is a hash of the weights, rounded to half precision so that an export in float16
    counts as the same tokenizer. `attention_window` is hashed too, because it changes the codes of
    long clips. A tokenizer with a smaller decoder has the fingerprint of the tokenizer that it was
    made of, as long as its encoder is still the same (`codes_of` in its config).
    """
    origin = getattr(tokenizer.config, "codes_of", None)
    if origin is not None and origin[0] == encoder_fingerprint(tokenizer):
        fingerprint = origin[1]
    else:
        fingerprint = weights_fingerprint(tokenizer.state_dict(), tokenizer.config.attention_window)
    return {
        "fingerprint": fingerprint,
        "num_codes": tokenizer.num_codes,
        "spatial_compression": tokenizer.spatial_compression,
        "temporal_compression": tokenizer.temporal_compression,
    }


def network_fingerprint(network: nn.Module) -> str:
    """Return the fingerprint of a video tokenizer or, for another network, a hash of its weights."""
    if hasattr(network, "num_codes"):  # The class cannot be named here: the module of it imports this one.
        return tokenizer_facts(network)["fingerprint"]
    return weights_fingerprint(network.state_dict(), None)


def same_codes_as(tokenizer: Any) -> tuple[str, str]:
    """Return the fingerprints of the encoder and of the tokenizer: `codes_of` of a tokenizer that has the same encoder."""
    return encoder_fingerprint(tokenizer), tokenizer_facts(tokenizer)["fingerprint"]


def encoder_fingerprint(tokenizer: Any) -> str:
    """Return a hash of the weights that decide the codes."""
    encoder = {name: tensor for name, tensor in tokenizer.state_dict().items() if name.startswith(ENCODER)}
    return weights_fingerprint(encoder, tokenizer.config.attention_window)


def weights_fingerprint(weights: Mapping[str, Tensor], attention_window: int | None) -> str:
    """Return a hash of weights by name, rounded to half precision, and of the window of attention."""
    digest = hashlib.blake2b(digest_size=16)
    if attention_window is not None:
        digest.update(f"attention_window {attention_window}".encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
