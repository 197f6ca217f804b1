"""Random weights in the layout of the Lumos-1 release: `python -m tests.released_layout FOLDER --hidden-size 512 --layers 12`.

    FOLDER/lumos/stage-2-joint/       config.json and bf16 shards, as the published trainer writes them
    FOLDER/cosmos/tokenizer/          text_tokenizer.json: 65,536 text entries, then 64,000 video codes
    FOLDER/cosmos/Cosmos-Tokenizer-DV4x8x8/  encoder.jit, decoder.jit
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import nn

from lumos import LumosConfig, LumosForVideoGeneration
from tokenizer import VideoTokenizer, VideoTokenizerConfig

WORDS = ["Ġred", "circle", "video", "Ġmoves"]
NAMED = {8196: "<eoss>", 8197: "<racm3:break>"}
DECODER, COSMOS = Path("lumos/stage-2-joint"), Path("cosmos")
VIDEO_TOKENIZER = COSMOS / "Cosmos-Tokenizer-DV4x8x8"
TEXT_TOKENIZER = COSMOS / "tokenizer" / "text_tokenizer.json"


def write_release(
    folder: Path, *, hidden_size=64, layers=2, heads=2, kv_heads=1, channels=8, shard=16_600_000, dtype=torch.bfloat16
) -> None:  # fmt: skip
    """Write the three parts with the published ids and numbers of codes, and with the given widths."""
    torch.manual_seed(0)
    config = LumosConfig(
        hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )  # fmt: skip
    write_decoder(folder / DECODER, config, shard, dtype)
    (folder / DECODER / "config.json").write_text(json.dumps(released_config(config)))
    write_text_tokenizer(folder / TEXT_TOKENIZER)
    sizes = {} if channels is None else {"channels": channels, "num_res_blocks": 1}
    write_video_tokenizer(folder / VIDEO_TOKENIZER, VideoTokenizerConfig(**sizes), dtype)


def write_decoder(folder: Path, config: LumosConfig, limit: int, dtype: torch.dtype) -> None:
    """Write shards of at most `limit` bytes and their index, with at most one shard in memory."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LumosForVideoGeneration(config).named_parameters()}
    runs: list[list[str]] = [[]]
    for name, shape in shapes.items():
        if runs[-1] and sum(shapes[n].numel() for n in runs[-1]) + shape.numel() > limit // dtype.itemsize:
            runs.append([])
        runs[-1].append(name)
    weight_map = {}
    for number, names in enumerate(runs, 1):
        file = f"model-{number:05d}-of-{len(runs):05d}.safetensors"
        save_file({name: random_tensor(name, shapes[name], dtype) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    if "norm" in name:
        return torch.full(shape, float(name.endswith("weight")), dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(std=0.02)


def released_config(config: LumosConfig) -> dict:
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "max_position_embeddings", "rms_norm_eps", "initializer_range", "model_parallel_size")  # fmt: skip
    return {
        **{name: getattr(config, name) for name in shared},
        "model_type": "chameleon", "architectures": ["ChameleonXLLMXForConditionalGeneration"], "torch_dtype": "bfloat16",
        "rope_theta": 500000.0, "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "swin_norm": False,
        "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "mm_rope": True,
        "mask_image_logits": True, "dropout": 0.0, "z_loss_weight": 0.0, "vq_config": {}, "vocabulary_map": {"<s>": 0},
    }  # fmt: skip


def text_entries() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary and merges: special, reserved and code tokens at the published ids, bytes, and a few words."""
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    vocab |= {f"IMGIMG{letters(i)}Z": 4 + i for i in range(8192)}
    for i in range(8196, 16384):
        vocab[NAMED.get(i, f"<reserved{i - 4:05d}>")] = i
    merges, pieces = [], sorted(pre_tokenizers.ByteLevel.alphabet())
    for word in WORDS:
        left = word[0]
        for letter in word[1:]:
            merges.append((left, letter))
            left += letter
            if left not in pieces:
                pieces.append(left)
    vocab |= {piece: 16384 + i for i, piece in enumerate(pieces)}
    vocab |= {f"VIDVID{letters(c)}Z": 65536 + c for c in range(64000)}
    return vocab, merges


def letters(number: int) -> str:
    return "".join("ABCDEFGHIJ"[int(digit)] for digit in str(number))


def write_text_tokenizer(path: Path, change=lambda vocab: vocab) -> None:
    vocab, merges = text_entries()
    bpe = tokenizers.Tokenizer(models.BPE(change(vocab), merges, ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    path.parent.mkdir(parents=True, exist_ok=True)
    bpe.save(str(path))


def write_video_tokenizer(folder: Path, config: VideoTokenizerConfig, dtype: torch.dtype) -> None:
    """Write the two archives, and a config.json if the widths are not the published ones."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = VideoTokenizer(config).to(dtype).state_dict()
    for name, keys in (("encoder", ("encoder.", "quant_conv.")), ("decoder", ("decoder.", "post_quant_conv."))):
        part = {k: v for k, v in tensors.items() if k.startswith(keys)}
        torch.jit.save(torch.jit.trace(Archive(part), torch.zeros(1)), str(folder / f"{name}.jit"))
    if config != VideoTokenizerConfig():
        (folder / "config.json").write_text(json.dumps(config.to_dict()))


class Inner(nn.Module):
    def forward(self, x):
        return x


class Archive(Inner):
    """A module that holds tensors under their dotted names, for torch.jit.save."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for key, tensor in tensors.items():
            module: nn.Module = self
            *path, last = key.split(".")
            for name in path:
                if name not in module._modules:
                    module.add_module(name, Inner())
                module = module._modules[name]
            module.register_buffer(last, tensor.clone())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--channels", type=int, help="of the video tokenizer; default: the published network")
    asked = parser.parse_args()
    write_release(asked.folder, hidden_size=asked.hidden_size, layers=asked.layers, heads=asked.hidden_size // 64,
                  kv_heads=max(1, asked.hidden_size // 256), channels=asked.channels, shard=10**9)  # fmt: skip
