"""The engine for DeepSpeed ZeRO 0 to 3. This module is imported only by runs that use DeepSpeed.

ZeRO shards the optimizer state (stage 1), the gradients too (stage 2) and the weights too (stage 3)
over the processes of a run. The engine works without a CUDA device and without a compiler: it then
uses gloo instead of nccl, and always PyTorch's AdamW and no operator that DeepSpeed would compile.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from lumos.errors import UserError
from lumos.threads import processes_here
from lumos.training.engine import Slot, TrainingEngine, make_optimizer, pick_precision, set_learning_rate, whole_slots
from lumos.training.sections import WHOLE_MATRICES
from lumos.training.settings import TrainingSettings

OWN_KEYS = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size and training.micro_batch_size",
    "gradient_clipping": "training.clip_grad",
    "optimizer": "training.lr, betas, eps and weight_decay",
    "scheduler": "training.schedule",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast": "training.precision",
}
"""DeepSpeed options that a config file must not set, each with the settings that decide it."""
BUCKET = 50_000_000
"""Number of gradient values that are reduced at once if no config file sets it, as in configs/deepspeed.

DeepSpeed's default is ten times as many and takes 2 GB of GPU memory, however small the model is."""


def connect(device: torch.device, timeout_minutes: float) -> None:
    """Connect this process with the other processes of the run.

    A run without a launcher becomes a group of one process. A process that waits longer than
    `timeout_minutes` for another one ends with an error. Raises UserError if DeepSpeed is not
    installed.
    """
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"DeepSpeed cannot be imported ({error}), which several processes or deepspeed.zero_stage need; "
            "install it with pip install 'lumos-video[deepspeed]', or run one process without the deepspeed section"
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed still calls torch functions by their old names, which gives these warnings.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes_here()))
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # Otherwise runs with gloo would compile a shared-memory operator for a minute and a half, and fail
    # without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(minutes=timeout_minutes)
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)


def deepspeed_options(settings: TrainingSettings, stage: int, precision: torch.dtype) -> dict[str, Any]:
    """Return the DeepSpeed config: the options of the file, then those that the settings decide.

    Raises UserError for an option that both decide, and for settings that the stage does not support.
    """
    file, options = settings.deepspeed.config, settings.deepspeed.file_options()
    for key in options:
        if key in OWN_KEYS:
            raise UserError(f"deepspeed.config {file} sets {key}; leave it out, it follows from {OWN_KEYS[key]}")
    zero = dict(options.pop("zero_optimization", {}))
    if settings.deepspeed.zero_stage is not None and zero.get("stage", stage) != stage:
        raise UserError(f"deepspeed.zero_stage is {stage}, but {file} has stage {zero['stage']}; set only one of them")
    zero.setdefault("stage", stage)
    if file is None and stage:
        zero["reduce_bucket_size"] = BUCKET
    if (optimizer := settings.training.optimizer) in WHOLE_MATRICES and zero["stage"]:
        raise UserError(
            f"training.optimizer is {optimizer}, which needs whole matrices, but ZeRO {zero['stage']} cuts them; "
            "set deepspeed.zero_stage=0, or training.optimizer=adamw"
        )
    if settings.training.compile and zero["stage"] == 3:
        raise UserError(
            "training.compile is true, but ZeRO 3 runs code of its own around each module, which torch compiles again for each "
            "of them until it gives up; set deepspeed.zero_stage=2, or training.compile=false"
        )
    half = precision == torch.bfloat16
    # The loop counts the micro-batches, because their number may vary from step to step. DeepSpeed is
    # told that there is one.
    return {
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        **options,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.training.clip_grad if zero["stage"] else 0.0,
        "zero_optimization": zero,
        # Stage 0 keeps no fp32 copy (master) of bf16 weights, so it uses autocast, as plain PyTorch does.
        # Stage 1 would keep each bf16 gradient until the update, although the fp32 sum contains it.
        "bf16": {"enabled": half and zero["stage"] > 0, "check_grad_overflow": True, "immediate_grad_update": zero["stage"] == 1},
        "torch_autocast": {"enabled": half and zero["stage"] == 0, "dtype": "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


class DeepSpeedEngine(TrainingEngine):
    """The part of a DeepSpeed run that one process computes.

    With bf16 and a stage above 0 the model has bf16 weights, and the optimizer keeps fp32 copies of
    them, called masters.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSettings,
        device: torch.device,
        stage: int,
        matrices: Mapping[str, float] | None = None,
    ):
        import deepspeed

        self.device, self.clip = device, settings.training.clip_grad
        precision = pick_precision(settings.training.precision, device)
        options = deepspeed_options(settings, stage, precision)
        self.stage = options["zero_optimization"]["stage"]
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.stores = self.stage > 0 or self.rank == 0
        self.kind = f"DeepSpeed ZeRO {self.stage}"
        model = model.to(device)
        self.inner = make_optimizer(model, settings, device, matrices)
        file = settings.deepspeed.config
        try:
            self.model, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=self.inner, config=options)
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            if file is None:
                raise
            raise UserError(f"DeepSpeed does not start with deepspeed.config {file}: {type(error).__name__}: {error}") from error
        self.module = self.model.module
        wanted = sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters() if p.requires_grad)
        kept = sum(slot.count for slot in self.slots().values()) if self.stores else 0
        if (found := int(self.all_sum(torch.tensor([kept])))) != wanted:
            raise UserError(
                f"deepspeed.config {file} spreads the weights in a way that checkpoints cannot hold ({found} of {wanted} values "
                "found); leave out options that are not plain ZeRO, for example mics, zenflow and nvme"
            )

    def autocast(self) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over processes; the loss is already divided by the count of all of them.
        self.model.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        set_learning_rate(self.optimizer, lr)
        if self.stage == 0:
            norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip or math.inf))
            if math.isfinite(norm):
                self.model.step()
            else:
                self.model.zero_grad()
            return norm
        self.model.step()
        # If a gradient overflows, DeepSpeed skips the update in all processes.
        return math.nan if self.optimizer.overflow else float(self.model.get_global_grad_norm())

    def all_sum(self, values: Tensor) -> Tensor:
        values = values.to(self.device, copy=True)
        torch.distributed.all_reduce(values)
        return values.cpu()

    def slots(self) -> dict[str, Slot]:
        if self.stage == 0:
            return whole_slots(self.module)
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        found = {name: self._sharded_slot(p) if self.stage == 3 else self._flat_slot(p) for name, p in trained.items()}
        return {name: slot for name, slot in found.items() if slot is not None and slot.count}

    def _flat_slot(self, parameter: nn.Parameter) -> Slot | None:
        """Return the slot of a parameter under ZeRO 1 and 2, or None if this process has no part of it.

        These stages shard one flat tensor of all parameters of a group. A process can therefore hold
        all of a parameter, a part of it or nothing.
        """
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        (owner,) = self.optimizer.param_groups[mapping.param_group_index]["params"]
        return Slot(owner, mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)

    def _sharded_slot(self, parameter: nn.Parameter) -> Slot:
        """Return the slot of a parameter under ZeRO 3, which cuts each parameter into equal parts; the last is padded."""
        group, offset, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = self.rank * size
        owner = self.optimizer.fp32_partitioned_groups_flat[group]
        return Slot(owner, offset, start, max(0, min(size, parameter.ds_numel - start)))

    def weights_changed(self) -> None:
        """Copy the masters into the model, with the calls that end DeepSpeed's own update."""
        if self.stage == 0:
            return
        if self.stage < 3:
            self.optimizer.update_lp_params()
            return
        self.optimizer._partition_all_parameters()
        for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters stay whole in every process, which needs the new values of the other parts.
        if persistent := self.optimizer.persistent_parameters:
            persistent[0].all_gather(persistent)
