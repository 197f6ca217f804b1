"""The fixed memory of one training process: weights, gradients and optimizer, whatever the batch. In bytes, by arithmetic."""

from __future__ import annotations

import math

from lumos.planning.cost import TrainingCost
from lumos.planning.sharding import Sharding
from lumos.training.engine import factor_shapes

AT_ONCE = 500_000_000
"""The number of gradients that DeepSpeed reduces at once in ZeRO 1 with bf16 weights; it ignores the bucket size there."""


def host_bytes(cost: TrainingCost, sharding: Sharding) -> int:
    """Return the bytes of host memory that one process uses for offloaded data.

    With an offloaded optimizer these are float32 weights, moments and gradients; with offloaded weights the
    weights themselves.
    """
    share = math.ceil(cost.trained / sharding.world)
    optimizer = (20 if sharding.averaged else 16) * share if sharding.offload_optimizer else 0
    weights = sharding.product * math.ceil(cost.parameters / sharding.world) if sharding.offload_weights else 0
    return optimizer + weights


def optimizer_bytes(cost: TrainingCost, optimizer: str) -> int:
    """Return the bytes of the undivided state of an optimizer: moments, or the rows and columns of Adafactor, all in float32."""
    if optimizer == "adafactor":
        return 4 * sum(math.prod(factor) for shape in cost.trained_shapes for factor in factor_shapes(shape).values())
    return 8 * cost.trained - (4 * cost.matrices if optimizer == "muon" else 0)


def update_bytes(cost: TrainingCost, optimizer: str, muon: int) -> int:
    """Return the bytes that the update of an optimizer needs beside its state.

    muon: the bytes of an update of Muon for each weight of its largest stack. Adafactor makes the update of one parameter at a
    time; AdamW's is fused.
    """
    if optimizer == "adafactor":
        return 4 * max(map(math.prod, cost.trained_shapes))
    return cost.stacked * muon if optimizer == "muon" else 0


def fixed_bytes(cost: TrainingCost, sharding: Sharding) -> dict[str, int]:
    """Return the bytes on the device that do not depend on the batch, by part: weights, gradients, optimizer, buffers."""
    parameters, trained = cost.parameters, cost.trained
    share, stage = math.ceil(trained / sharding.world), sharding.stage or 0
    if stage == 0:
        # Autocast keeps bf16 copies of trained matrices during a step, and of frozen ones only as long as activations.
        cast = cost.cast_parameters(sharding.checkpointing)
        weights = 4 * parameters + (2 * cast if sharding.autocast else 0)
        averaged = 4 * trained if sharding.averaged else 0
        optimizer = optimizer_bytes(cost, sharding.optimizer) + averaged
        return {"weights": weights, "gradients": 4 * trained, "optimizer": optimizer, "buffers": 0}
    compute = sharding.product
    own = math.ceil(parameters / sharding.world) if stage == 3 else parameters
    # DeepSpeed reduces gradients in float32, in buckets. A gradient larger than a bucket (embedding, head) is reduced alone.
    # A bucket is allocated in full even for a small model; on a CPU, pages that are never written cost no memory.
    bucket = sharding.bucket if sharding.on_gpu else min(sharding.bucket, trained)
    buffers = 4 * max(0 if cost.is_tuned else cost.largest_parameter, bucket) + 2 * 4 * bucket
    if stage == 1 and sharding.half:
        gradients, buffers = 4 * trained, 4 * min(trained, AT_ONCE)  # all in float32, and a copy for the reduction
    elif stage == 1:
        gradients = 4 * trained + 4 * share  # all, and this process's share for the optimizer
    elif stage == 2:
        gradients = compute * share + 4 * share
    else:
        gradients = 4 * share + 4 * share
        buffers += compute * min(parameters, sharding.live)  # gathered weights
    on_device = not sharding.offload_optimizer
    return {
        "weights": 0 if sharding.offload_weights else compute * own,
        "gradients": gradients if on_device or stage == 1 else compute * share,
        "optimizer": on_device * (16 if sharding.averaged else 12) * share,  # float32 weights, two moments, averages
        "buffers": buffers,
    }
