"""The DeepSpeed engine: ZeRO 1, 2 and 3, with or without offload, from the original's JSON files.

`fill_config` replaces "auto" in the JSON and refuses what contradicts the run's settings; `ZeroEngine` has the
interface of `engine.Engine`. The loop's optimiser and schedule are used also where a JSON names its own
(`stage1_bf16.json`, whose linear schedule silently replaced the cosine), with a remark. DeepSpeed's files are read back
with torch's weights-only unpickler.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError, ConfigError, counted, first_line
from seed_multimodal.training.distributed import ProcessGroup, environment_number
from seed_multimodal.training.engine import Engine, keeping_hyperparameters, start_accelerate
from seed_multimodal.training.loop_settings import LoopSettings
from seed_multimodal.training.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

_INTEGERS = ("gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu")


def fill_config(config: Mapping[str, Any], settings: LoopSettings, *, world: int, rows: int, hidden_size: int,
                cpu_adam: bool = False) -> tuple[dict[str, Any], list[str]]:
    """A DeepSpeed configuration without "auto", and remarks.

    Args:
        rows: sequences of a micro-batch; nominal, DeepSpeed uses it for its own log only.
        hidden_size: of the model; buckets of ZeRO-3 follow from it, as in transformers.
        cpu_adam: DeepSpeed's own CPU optimiser for offloaded states.

    Raises:
        ConfigError: no ZeRO stage, or a value that contradicts the run's.
    """
    filled: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value
                              for key, value in config.items()}
    zero = filled.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise ConfigError("deepspeed: zero_optimization.stage must be 1, 2 or 3.")
    remarks = [f"the {key} of the DeepSpeed configuration is left out: optim has it" for key in
               ("optimizer", "scheduler") if filled.pop(key, None) is not None]
    for key in _INTEGERS:
        if isinstance(filled.get(key), float):
            filled[key] = int(filled[key])
    accumulate = settings.accumulate
    _agree(filled, "gradient_accumulation_steps", accumulate)
    _agree(filled, "gradient_clipping", settings.clip)
    for kind in ("bf16", "fp16"):
        block = filled.get(kind)
        wanted = settings.precision == kind
        if wanted and not isinstance(block, dict):
            raise ConfigError(f"deepspeed: the configuration has no {kind} block, but trainer.precision is {kind}.")
        if isinstance(block, dict):
            if block.get("enabled") not in ("auto", wanted):
                raise ConfigError(f"deepspeed: {kind} is {block.get('enabled')} there, but trainer.precision is "
                                  f"{settings.precision!r}.")
            block["enabled"] = wanted
    if filled.get("train_micro_batch_size_per_gpu") in ("auto", None):
        filled["train_micro_batch_size_per_gpu"] = rows
    filled["train_batch_size"] = filled["train_micro_batch_size_per_gpu"] * accumulate * world
    by_size = {"reduce_bucket_size": hidden_size**2, "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
               "stage3_param_persistence_threshold": 10 * hidden_size}
    zero.update({key: value for key, value in by_size.items() if zero.get(key) == "auto"})
    filled["zero_allow_untested_optimizer"] = True
    filled["zero_force_ds_cpu_optimizer"] = cpu_adam
    left = [key for key, value in [*filled.items(), *zero.items()] if value == "auto"]
    if left:
        raise ConfigError(f"deepspeed: {left[0]} cannot be 'auto'.")
    return filled, remarks


def use_offload_threads(config: Mapping[str, Any]) -> str:
    """Give this process its share of the node's cores if its optimiser's states are offloaded, so on the CPU's side of
    every step; returns a remark ("": nothing was changed).

    torchrun sets OMP_NUM_THREADS=1 where there are several processes, which would leave all cores but one a process
    idle meanwhile. Any other value is the user's and stays.
    """
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    processes = environment_number("LOCAL_WORLD_SIZE", 1)
    if offload.get("device") not in ("cpu", "nvme") or processes < 2:
        return ""
    if (given := os.environ.get("OMP_NUM_THREADS", "1")) != "1":
        return f"offloaded optimiser states: OMP_NUM_THREADS={given} CPU threads a process, as set"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // processes)
    torch.set_num_threads(threads)
    return (f"offloaded optimiser states: {counted(threads, 'CPU thread')} in each of this node's {processes} "
            f"processes ({counted(cores, 'core')}; torchrun's OMP_NUM_THREADS=1 is not kept, another value is)")


def _agree(filled: dict[str, Any], key: str, value: float) -> None:
    if filled.get(key, "auto") not in ("auto", value):
        raise ConfigError(f"deepspeed: {key} is {filled[key]} there, but {value} in trainer; make them equal.")
    filled[key] = value


class ZeroEngine(Engine):
    """A task's module in DeepSpeed's engine; gradients, optimiser states and (stage 3) weights are spread over
    processes."""

    kind = "deepspeed"
    sharded = True

    def __init__(self, task: Task, settings: LoopSettings, group: ProcessGroup, device: torch.device,
                 config: Mapping[str, Any]) -> None:
        """Wrap a task's module; `config` is what `fill_config` gave.

        Raises:
            ConfigError: an optimiser that DeepSpeed cannot spread, or fp16 without a GPU.
        """
        if not isinstance(task.optimizer, torch.optim.Optimizer):
            raise ConfigError("optim: muon runs on the plain engine only; use adamw or adamw_hf with DeepSpeed.")
        self.config, self.stage = config, int(config["zero_optimization"]["stage"])
        super().__init__(task, settings, group, device)
        self.gathered = True

    def _accelerator(self) -> Accelerator:
        from accelerate import DeepSpeedPlugin

        if self.device.type == "cpu":
            _prepare_deepspeed_for_cpu()
        self._lone = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it at every step
        plugin = DeepSpeedPlugin(hf_ds_config=dict(self.config), zero3_init_flag=False)
        return start_accelerate(self.device, self.group, self.settings.precision, deepspeed_plugin=plugin,
                                gradient_accumulation_steps=self.settings.accumulate)

    def _prepare(self) -> nn.Module:
        model, self.optimizer = self.accelerator.prepare(self.module, self.optimizer)
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        """DeepSpeed casts by itself."""
        return nullcontext()

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Tell DeepSpeed whether the step ends with this micro-step."""
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a micro-step; after the last one they are reduced.

        Not accelerate's `backward`, which makes the optimiser step at once.
        """
        self.model.backward(loss, scale_wrt_gas=False)
        if not last:
            self.model.step()  # moves nothing, counts the micro-step

    def clip(self) -> None:
        """DeepSpeed clips inside its step."""
        return

    def update(self, rate: float) -> float:
        """Update the weights at a learning rate; returns the gradient norm before clipping."""
        self.set_rate(rate)
        self.model.step()
        norm = self.model.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def loss_scale(self) -> None:
        """DeepSpeed's own; it is not logged."""
        return

    @property
    def reads_numbers(self) -> bool:
        """DeepSpeed reads the norm of the gradients at each step."""
        return True

    def problem(self, norm: float | None) -> str:
        """What is wrong with the gradients ("": nothing); fp16 steps that overflow are skipped by DeepSpeed."""
        finite = norm is None or math.isfinite(norm)
        return "" if finite or self.settings.precision == "fp16" else f"The gradient norm became {norm}"

    def weights(self) -> dict[str, Tensor] | None:
        """The trained weights in 16 (or 32) bits; with ZeRO-3 gathered, and None but in the first process."""
        if self.stage == 3:
            return self.model._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        return {name: value.detach() for name, value in self.module.named_parameters() if value.requires_grad}

    def close(self) -> None:
        """Leave the environment as it was."""
        super().close()
        if self._lone:
            os.environ.pop("LOCAL_RANK", None)

    def save_shards(self, folder: Path, step: int) -> None:
        """Write this process's shards and `latest`; all processes call it."""
        self.model.save_checkpoint(str(folder), tag=f"global_step{step}", client_state={}, save_latest=True,
                                   exclude_frozen_parameters=True)

    def load_shards(self, folder: Path, step: int) -> None:
        """Read the shards back; all processes call it.

        Raises:
            CheckpointError: shards of another model, stage or number of processes, or unsafe content.
        """
        with _weights_only(), keeping_hyperparameters(self.optimizer):
            try:
                path, _ = self.model.load_checkpoint(str(folder), tag=f"global_step{step}", load_module_strict=False)
            except (RuntimeError, ValueError, KeyError, AssertionError, OSError) as error:
                raise CheckpointError(f"{folder}: its ZeRO shards cannot be read ({first_line(error)}); "
                                      "they belong to the same model, optimiser, ZeRO stage and number of processes."
                                      ) from error
        if path is None:
            raise CheckpointError(f"{folder}: its ZeRO shards cannot be read: global_step{step} is not complete.")


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """The trained weights in fp32 on the CPU, from DeepSpeed's own copies of stages 1 and 2, which are spread; all
    processes call it, after training and before the engine is closed."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter).detach().float().cpu()
            for name, parameter in module.named_parameters() if parameter.requires_grad}


def _prepare_deepspeed_for_cpu() -> None:
    """Without it DeepSpeed warns that it found no GPU, and compiles a collective operation for shared memory at its
    first start (a minute, and it needs a C++ compiler), which gloo does as well."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def _weights_only() -> Iterator[None]:
    """torch.load inside DeepSpeed refuses anything but tensors, plain containers and DeepSpeed's own loss scaler."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
