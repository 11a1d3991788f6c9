"""The plain engine: one process, or DistributedDataParallel, on accelerate. What moves weights, behind one interface.

An engine makes an optimiser step in two halves, so that all processes can agree that a step is sound before weights
move: `backward` for each micro-batch, then `gradient_norm` and `update`. Weights that are trained are kept in fp32 and
products are computed in the run's precision (autocast). `zero.ZeroEngine` is the same over DeepSpeed.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.errors import ConfigError
from seed_multimodal.training.llm.loss import LossParts
from seed_multimodal.training.llm.processes import Processes
from seed_multimodal.training.llm.trainer_settings import TrainerSettings

_MIXED = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}
_SMALLEST_SCALE = 2.0**-20  # so many overflows in a row are no passing ones


class PlainEngine:
    """`module` (a `LossModule`) and its optimiser in each process; DDP averages gradients.

    Attributes:
        loss_factor: what the loss of a micro-batch is multiplied with before the backward pass.

    Raises:
        ConfigError: fp16 without a GPU.
    """

    kind = "plain"
    sharded = False  # this process's checkpoint needs the others' parts
    loss_factor = 1.0

    def __init__(self, module: nn.Module, optimizer: Any, settings: TrainerSettings, processes: Processes) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        if settings.precision == "fp16" and processes.device.type == "cpu":
            raise ConfigError("trainer: fp16 needs a GPU; use bf16 or fp32 on a CPU.")
        processes.tell_accelerate()
        ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        self.accelerator = Accelerator(mixed_precision=_MIXED[settings.precision], kwargs_handlers=[ddp])
        processes.check(self.accelerator)
        self.module, self.optimizer, self.settings = module, optimizer, settings
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=settings.precision == "fp16")
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.model = self.accelerator.prepare_model(module, device_placement=False)

    def forward(self, batch: LlmBatch) -> LossParts:
        """The loss of one micro-batch."""
        return self.model(batch.input_ids, batch.labels, batch.position_ids, batch.attention_mask)

    def accumulating(self, last: bool) -> Any:
        """Context of a micro-step: gradients are exchanged after the last one of a step only."""
        return nullcontext() if last or self.accelerator.num_processes == 1 else self.model.no_sync()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch."""
        self.scaler.scale(loss).backward()

    def gradient_norm(self) -> float | None:
        """Norm of the step's gradients before clipping; clips them. None: known after `update` only."""
        self.scaler.unscale_(self.optimizer)
        return float(torch.nn.utils.clip_grad_norm_(self.trained, self.settings.max_grad_norm or math.inf))

    def update(self, rate: float) -> float | None:
        """Move the weights with a learning rate; an fp16 step that overflowed is skipped. Gives the norm if only now
        known."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return None

    def problem(self, norm: float | None) -> str:
        """What is wrong with the gradients ("": nothing)."""
        if norm is None or math.isfinite(norm):
            return ""
        if not self.scaler.is_enabled():
            return f"The gradient norm became {norm}"
        return "" if self.scaler.get_scale() > _SMALLEST_SCALE else (
            "The fp16 gradients overflow at any loss scale (use bf16 or fp32)")


def round_residual(module: nn.Module, precision: str) -> None:
    """Keep the residual stream of a half-precision base in half precision, as in a model that is so throughout.

    Embeddings trained in fp32 would otherwise make every activation between layers fp32, twice the memory: they are
    rounded where they leave their table. Models of fp32 weights stay as they are.
    """
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if half is None or not any(p.dtype == half and not p.requires_grad for p in module.parameters()):
        return

    def rounded(table: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.to(half)

    for part in module.modules():
        if isinstance(part, nn.Embedding) and part.weight.requires_grad:
            part.register_forward_hook(rounded)
