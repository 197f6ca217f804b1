"""The fingerprint of a video tokenizer: what decides whether codes fit it."""

from __future__ import annotations

import hashlib
from typing import Any


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What decides whether codes fit a video tokenizer.

    The fingerprint is of the weights rounded to half precision: an export in float16 is the same tokenizer. A window of
    attention belongs to it, because it changes the codes of long clips.
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
