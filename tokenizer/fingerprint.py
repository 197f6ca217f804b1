"""The fingerprint of a video tokenizer, which tells whether codes were made by that tokenizer."""

from __future__ import annotations

import hashlib
from typing import Any


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Return the fingerprint of a video tokenizer, its number of codes and its compression.

    Codes fit a tokenizer if all four values are the same as those of the tokenizer that made them.
    The fingerprint is a hash of the weights, rounded to half precision so that an export in float16
    counts as the same tokenizer. `attention_window` is hashed too, because it changes the codes of
    long clips.
    """
    digest = hashlib.blake2b(digest_size=16)
    if tokenizer.config.attention_window is not None:
        digest.update(f"attention_window {tokenizer.config.attention_window}".encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().half().cpu().contiguous().numpy().tobytes())
    return {
        "fingerprint": digest.hexdigest(),
        "num_codes": tokenizer.num_codes,
        "spatial_compression": tokenizer.spatial_compression,
        "temporal_compression": tokenizer.temporal_compression,
    }
