"""The training engine: plain torch, one process or DistributedDataParallel (DeepSpeed:
`zero_engine`).

Trained weights are kept in fp32; forward passes use autocast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from seed_multimodal.device import DTYPES
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.state_dicts import read_training_state
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.task import ONE_PROCESS, Task, frozen_names

OPTIMIZER_FILE = "optimizer.pt"
MIN_LOSS_SCALE = 2.0**-20  # 36 consecutive overflows from GradScaler's initial scale
# Of a parameter group; the learning rate is set at each step.
HYPERPARAMETERS = ("betas", "eps", "weight_decay", "lr_scale")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast in a precision of `DTYPES`; none for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


class Engine:
    """A task's module and optimizer in one process or DDP; the task's `loss` calls `model`.

    sharded: each process writes its shard of a checkpoint (`ZeroEngine.save_shards`).
    """

    sharded = False

    def __init__(self, task: Task, group: ProcessGroup, device: torch.device) -> None:
        """Wrap a task's module. Raises ConfigError: several processes for a single-process task."""
        if group.world > 1 and task.ddp_options is ONE_PROCESS:
            raise ConfigError(
                f"[{task.name}] this stage supports a single process, not {group.world}."
            )
        self.task = task
        self.settings = task.settings
        self.group = group
        self.device = device
        self.module = task.module
        self.optimizer = task.optimizer
        # Parameters of the optimizer, in the module's order.
        optimized = {p for group in self.optimizer.param_groups for p in group["params"]}
        self.trained = [p for p in task.module.parameters() if p in optimized]
        self.model = self._prepare()
        # DeepSpeed scales the loss itself.
        scales_loss = self.settings.precision == "fp16" and not self.sharded
        self.scaler = torch.amp.GradScaler(device.type, enabled=scales_loss)

    def _prepare(self) -> nn.Module:
        """The module that the task calls, wrapped for the processes."""
        if self.group.world == 1:
            return self.module
        device_ids = None if self.device.type == "cpu" else [self.device]
        options = self.task.ddp_options or {}
        return DistributedDataParallel(
            self.module, device_ids, gradient_as_bucket_view=True, **options
        )

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast in the run's precision."""
        return autocast(self.device, self.settings.precision)

    def attention(self) -> AbstractContextManager[object]:
        """The attention kernels of the task's forward pass."""
        if self.task.plain_attention and self.device.type == "cpu":
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Context of a micro-step: gradients are reduced only after a step's last one."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradients of a micro-step."""
        self.scaler.scale(loss).backward()

    def clip(self) -> Tensor | None:
        """Clip the gradients; returns their norm before clipping, or None if only `update` knows
        it."""
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm or math.inf)

    def update(self) -> dict[str, float]:
        """Update the weights; on fp16 overflow the step is skipped and the loss scale halved.

        Returns further numbers of the step: fp16's `loss_scale`, DeepSpeed's `grad`.
        """
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of all groups."""
        for parameter_group in self.optimizer.param_groups:
            parameter_group["lr"] = lr * parameter_group.get("lr_scale", 1.0)

    def gradient_error(self, norm: float | None) -> str:
        """Error message for the gradients, or ""; a single fp16 overflow is no error."""
        if self.scaler.is_enabled() and self.scaler.get_scale() <= MIN_LOSS_SCALE:
            return "The fp16 gradients overflow at any loss scale (use bf16 or fp32)"
        if norm is None or math.isfinite(norm) or self.settings.precision == "fp16":
            return ""
        return f"The gradient norm became {norm}"

    def weights(self) -> dict[str, Tensor]:
        """The weights of a checkpoint (of the first process), by their names in the module, with
        which they share memory."""
        frozen = set() if self.task.saves_frozen else set(frozen_names(self.module))
        weights = self.module.state_dict()
        return {name: value for name, value in weights.items() if name not in frozen}

    def state_dict(self) -> dict[str, object]:
        """States of optimizer and loss scaler."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load(self, folder: Path, step: int) -> None:
        """Load the optimizer from a checkpoint, keeping this run's hyperparameters (weight decay,
        betas).

        Raises CheckpointError: state of another optimizer.
        """
        state: Any = read_training_state(folder / OPTIMIZER_FILE)
        with keeping_hyperparameters(self.optimizer):
            try:
                self.optimizer.load_state_dict(state["optimizer"])
            except (ValueError, KeyError) as error:
                raise CheckpointError(
                    f"{folder}: has the state of another optimizer ({error})."
                ) from error
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        """Reset global state for another run in this process; plain torch has none."""


@contextmanager
def keeping_hyperparameters(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Context in which loading an optimizer's state keeps this run's weight decay and betas."""
    hyperparameters = [
        {key: group[key] for key in HYPERPARAMETERS if key in group}
        for group in optimizer.param_groups
    ]
    yield
    for group, values in zip(optimizer.param_groups, hyperparameters, strict=True):
        group.update(values)
