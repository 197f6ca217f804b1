"""Fingerprints of the frozen networks of a STIV model: that of its latents, and a frozen text encoder."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from lumos.files import read_json
from lumos.models.stiv.latents import AUTOENCODER_FOLDERS, load_autoencoder
from tokenizer.fingerprint import tokenizer_facts
from tokenizer.video import VideoTokenizer


def load_network(folder: str) -> nn.Module:
    """Return the image autoencoder of a folder or, if it has none, its video tokenizer."""
    for place in (Path(folder), *(Path(folder) / name for name in AUTOENCODER_FOLDERS)):
        config = read_json(place / "config.json", "the config of a network") if (place / "config.json").is_file() else None
        if isinstance(config, dict) and config.get("_class_name") == "AutoencoderKL":
            return load_autoencoder(place)
    return VideoTokenizer.from_pretrained(folder)


def network_fingerprint(network: nn.Module) -> str:
    """Return a hash of the weights of a network, rounded to half precision, as `tokenizer_facts` does for video tokenizers."""
    if isinstance(network, VideoTokenizer):
        return tokenizer_facts(network)["fingerprint"]
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
