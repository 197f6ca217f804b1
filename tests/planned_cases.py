"""Settings of small runs whose memory is planned and measured."""

from __future__ import annotations

NARROW = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
DEEP = NARROW | {"intermediate_size": 256, "num_hidden_layers": 6}
WIDE = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 9024, "visual_token_count": 8000,
}  # fmt: skip
CODES = NARROW | {
    "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 17_024, "visual_token_count": 16_000, "loss_chunk_size": 1024,
}  # fmt: skip


def case(model: dict, clips: int, *, side: int = 128, num_frames: int = 13, batches: int = 1, lora: dict | None = None, **training):
    return {
        "model": {"preset": "tiny", "overrides": model} | ({"from": "base"} if lora else {}),
        "lora": lora or {},
        "data": {"num_frames": num_frames, "height": side, "width": side},
        "training": {"device": "cpu", "batch_size": clips * batches, "micro_batch_size": clips, **training},
    }


SMALL = {"side": 64, "num_frames": 1}
CASES = {  # name -> settings, the part that takes most memory
    "activations": (case(DEEP, 3), "activations"),
    "activations, bf16": (case(DEEP, 2, precision="bf16"), "activations"),
    "checkpointing": (case(DEEP | {"num_hidden_layers": 8}, 5, activation_checkpointing=True), "activations"),
    "logits": (case(CODES, 3), "logits"),
    "logits, bf16": (case(CODES, 3, precision="bf16"), "logits"),
    "weights": (case(WIDE, 1, **SMALL), "optimizer"),
    "micro-batches, averages": (case(WIDE, 1, **SMALL, batches=2, ema_decay=0.9), "optimizer"),
    "muon": (case(WIDE | {"num_hidden_layers": 1}, 1, **SMALL, optimizer="muon"), "optimizer"),
    "adafactor": (case(WIDE, 1, **SMALL, optimizer="adafactor"), "weights"),
    "adapters": (case(DEEP, 2, lora={"rank": 8, "dropout": 0.1}), "activations"),
    "few adapters": (case(DEEP, 3, lora={"rank": 8, "targets": ["q_proj", "v_proj"]}), "activations"),
}
MORE = {"activations", "logits, bf16", "weights", "few adapters"}
"""Cases whose parts also occur in other cases."""
