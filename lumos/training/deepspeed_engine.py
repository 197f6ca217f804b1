"""DeepSpeed ZeRO 0 to 3 behind the interface of `PlainEngine`. Imported only when a run asks for it.

Works without a CUDA device and without a compiler: gloo instead of nccl, PyTorch's own AdamW, and no operator that
DeepSpeed would build.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lumos.errors import RunError, UserError
from lumos.training.engine import make_optimizer, pick_precision
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
"""DeepSpeed options that the run's own settings decide, and by which."""


def connect(device: torch.device) -> None:
    """Join the processes. A run without a launcher becomes a group of one. UserError if DeepSpeed is not installed."""
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"DeepSpeed cannot be imported ({error}), which several processes or deepspeed.zero_stage need; "
            "install it with pip install deepspeed, or run one process without the deepspeed section"
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Of torch functions that DeepSpeed still calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE", "1")
        torch.set_num_threads(max(1, torch.get_num_threads() // int(here)))
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # Else gloo runs would compile a shared-memory operator for a minute and a half, and fail where there is no
    # compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)


def deepspeed_options(settings: TrainingSettings, stage: int, precision: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed config: the file's options, then what the run's settings decide. UserError where both decide."""
    file, options = settings.deepspeed.config, settings.deepspeed.file_options()
    for key in options:
        if key in OWN_KEYS:
            raise UserError(f"deepspeed.config {file} sets {key}; leave it out, it follows from {OWN_KEYS[key]}")
    zero = dict(options.pop("zero_optimization", {}))
    if settings.deepspeed.zero_stage is not None and zero.get("stage", stage) != stage:
        raise UserError(f"deepspeed.zero_stage is {stage}, but {file} has stage {zero['stage']}; set only one of them")
    zero.setdefault("stage", stage)
    half = precision == torch.bfloat16
    # Micro-batches are counted by the loop, which may vary their number from step to step, so DeepSpeed is told of one.
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
        # Stage 0 has no fp32 masters for bf16 weights, so there bf16 is autocast, as in plain PyTorch.
        "bf16": {"enabled": half and zero["stage"] > 0, "check_grad_overflow": True},
        "torch_autocast": {"enabled": half and zero["stage"] == 0, "dtype": "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


class DeepSpeedEngine:
    """This process's part of a DeepSpeed run. In bf16, from stage 1 on, weights are bf16 with fp32 masters in the optimizer."""

    def __init__(self, model: nn.Module, settings: TrainingSettings, device: torch.device, stage: int):
        import deepspeed

        self.device, self.clip = device, settings.training.clip_grad
        precision = pick_precision(settings.training.precision, device)
        options = deepspeed_options(settings, stage, precision)
        self.stage = options["zero_optimization"]["stage"]
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.kind = f"deepspeed zero {self.stage}"
        model = model.to(device)
        optimizer = make_optimizer(model, settings, device)
        self.model, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
        self.module = self.model.module
        self.model.checkpoint_engine = _safe_checkpoint_engine(self.model)

    def autocast(self) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages gradients over processes; the loss is already divided by the count of all of them.
        self.model.backward(loss * self.world, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = None
        if self.stage == 0:
            norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip or math.inf))
            if not math.isfinite(norm):
                raise RunError(f"the gradient norm is {norm}")
        self.model.step()
        if getattr(self.optimizer, "overflow", False):
            raise RunError("the gradient norm is not finite")
        return float(self.model.get_global_grad_norm()) if norm is None else norm

    def all_sum(self, values: Tensor) -> Tensor:
        values = values.to(self.device, copy=True)
        torch.distributed.all_reduce(values)
        return values.cpu()

    def barrier(self) -> None:
        torch.distributed.barrier()

    def local_parameters(self) -> dict[str, Tensor]:
        return {name: (p.ds_tensor if self.stage == 3 else p).data for name, p in self.module.named_parameters()}

    def parameters_changed(self) -> None:
        """What ZeRO-3 still holds whole (small parameters always do) takes over what was written to the shares.

        The same two calls as at the beginning and end of DeepSpeed's own ZeRO-3 step.
        """
        if self.stage < 3:
            return
        self.optimizer._partition_all_parameters()
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def gathered(self) -> dict[str, Tensor]:
        import deepspeed

        weights = {}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter) if self.stage == 3 else nullcontext():
                if self.rank == 0:
                    weights[name] = parameter.detach().float().cpu().clone()
        return weights

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing beside DeepSpeed's own files."""

    def save_files(self, folder: Path) -> None:
        with _quiet():
            self.model.save_checkpoint(str(folder / "deepspeed"), tag="state", save_latest=False)

    def load_files(self, folder: Path) -> None:
        with _quiet():
            path, _ = self.model.load_checkpoint(str(folder / "deepspeed"), tag="state", load_lr_scheduler_states=False)
        if path is None:
            raise RunError(f"checkpoint {folder}: DeepSpeed finds no state in it")


def _safe_checkpoint_engine(engine: Any) -> Any:
    """DeepSpeed's reader of its own files, without the unpickling of anything but tensors and DeepSpeed's plain records."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    class SafeCheckpointEngine(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
                return torch.load(path, map_location=map_location, weights_only=True)

    return SafeCheckpointEngine(engine._config)


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints a line for each file that it saves or loads."""
    import deepspeed

    level = deepspeed.utils.logger.level
    deepspeed.utils.logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        deepspeed.utils.logger.setLevel(level)
