"""The engine that updates weights: accelerate's `Accelerator` for one process, DistributedDataParallel and FSDP2.

An engine makes an optimiser step in two halves, so that all processes can agree that a step is sound before weights
change: `backward` for each micro-step, then `clip` and `update`. Trained weights are kept in fp32 and products are
computed in the run's precision (autocast). `zero.ZeroEngine` is the same over DeepSpeed.

From accelerate come the process state, autocast, DDP and FSDP2, the exchange of gradients, the backward pass and
clipping. Ours: the order of these calls (accelerate's prepared optimiser would update one process's weights although
another has a NaN), the loss scaler on CPUs (accelerate has none there) and the smallest loss scale.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.training.distributed import ProcessGroup, environment_number
from seed_multimodal.training.failures import TrainingError
from seed_multimodal.training.loop_settings import LoopSettings
from seed_multimodal.training.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

_MIXED = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}
_SMALLEST_SCALE = 2.0**-20  # 36 overflows in a row from GradScaler's first value: not a passing one
_GIVEN = ("betas", "eps", "weight_decay", "lr_scale")  # of an optimiser's group; its rate is set at each step


class Engine:
    """A task's module and optimiser in one process, or in each of several (DDP, or with `fsdp` FSDP2).

    Attributes:
        model: what a task's `micro_step` calls.
        sharded: every process writes a part of the checkpoint of its own.
        gathered: weights are spread over processes; `weights` collects them.
    """

    kind = "plain"
    sharded = False

    def __init__(self, task: Task, settings: LoopSettings, group: ProcessGroup, device: torch.device) -> None:
        """Wrap a task's module.

        Raises:
            ConfigError: several processes for a task that supports one only, or a precision the device does not have.
        """
        if group.world > 1 and not task.parallel:
            raise ConfigError(f"[{task.name}] {group.world} processes run this stage, but it is made for one, so each "
                              "would train a model of its own.")
        self.task, self.settings, self.group, self.device = task, settings, group, device
        self.fsdp = self.gathered = settings.fsdp and group.world > 1
        self.module, self.optimizer = task.wrapped_part, task.optimizer
        self.trained = _trained_parameters(task, self.optimizer)
        self.accelerator = self._accelerator()
        self.model = self._prepare()
        self.scaler: torch.amp.GradScaler = self.accelerator.scaler or torch.amp.GradScaler(
            device.type, enabled=settings.precision == "fp16")

    def _accelerator(self) -> Accelerator:
        from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin

        if self.fsdp:
            layers = self.task.layer_classes
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, state_dict_type="FULL_STATE_DICT",
                auto_wrap_policy="transformer_based_wrap" if layers else "no_wrap",
                transformer_cls_names_to_wrap=list(layers) or None)
            return start_accelerate(self.device, self.group, self.settings.precision, fsdp_plugin=plugin)
        options = {"gradient_as_bucket_view": True, **self.task.ddp_options}
        return start_accelerate(self.device, self.group, self.settings.precision,
                                kwargs_handlers=[DistributedDataParallelKwargs(**options)])

    def _prepare(self) -> nn.Module:
        if self.fsdp:
            model, optimizer = self.accelerator.prepare(self.module, self.optimizer)
            self.optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
            self.trained = _trained_parameters(self.task, self.optimizer)  # FSDP2 has replaced the parameters
            return model
        if self.group.world == 1:
            return self.module
        return self.accelerator.prepare_model(self.module, device_placement=False)

    # ------------------------------------------------------------------------------------------------------- a step

    def autocast(self) -> AbstractContextManager[Any]:
        """Products in the run's precision."""
        if self.settings.precision == "fp16" and self.device.type == "cpu":  # accelerate computes in fp32 there
            return torch.autocast("cpu", torch.float16)
        return self.accelerator.autocast()

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Context of a micro-step: gradients are exchanged after the last one of a step only."""
        return nullcontext() if last or self.group.world == 1 else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a micro-step."""
        self.accelerator.backward(loss if self.accelerator.scaler is not None else self.scaler.scale(loss))

    def clip(self) -> Tensor | None:
        """Norm of the step's gradients before clipping; clips them. None: known after `update` only."""
        self.scaler.unscale_(self.optimizer)
        norm = self.accelerator.clip_grad_norm_(self.trained, self.settings.clip or math.inf)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def update(self, rate: float) -> float | None:
        """Update the weights at a learning rate (times a group's `lr_scale`); an fp16 step whose gradients overflowed
        is skipped and the loss scale halved. Returns the norm if it is known only now."""
        self.set_rate(rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return None

    def set_rate(self, rate: float) -> None:
        """Give all groups their learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)

    def loss_scale(self) -> float | None:
        """fp16's scale of the loss; None in other precisions."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    @property
    def reads_numbers(self) -> bool:
        """Whether a step waits for the device anyway: fp16 looks for overflows."""
        return self.scaler.is_enabled()

    def problem(self, norm: float | None) -> str:
        """What is wrong with the gradients ("": nothing)."""
        if self.scaler.is_enabled():
            return "" if self.scaler.get_scale() > _SMALLEST_SCALE else (
                "The fp16 gradients overflow at any loss scale (use bf16 or fp32)")
        return "" if norm is None or math.isfinite(norm) else f"The gradient norm became {norm}"

    # ------------------------------------------------------------------------------------------------------- states

    def weights(self) -> dict[str, Tensor] | None:
        """The trained weights by their names in the wrapped part, whole, where they are spread over processes (None:
        they are not). All processes call it; with ZeRO-3 only the first one gets them."""
        if not self.gathered:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return dict(get_model_state_dict(self.model, options=options))

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and loss scaler; all processes call it, the first one's counts."""
        optimizer = self.optimizer.state_dict()
        if self.gathered:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], where: str) -> None:
        """Inverse of `state_dict`. Hyperparameters (weight decay, betas) stay as this run has set them.

        Raises:
            CheckpointError: a state of another optimiser.
        """
        with keeping_hyperparameters(self.optimizer):
            try:
                if self.gathered:
                    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

                    set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"],
                                             options=StateDictOptions(full_state_dict=True))
                else:
                    self.optimizer.load_state_dict(state["optimizer"])
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{where}: holds the state of another optimiser ({error}).") from error
            if not self.gathered:
                _restore_strides(self.optimizer)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        """Take off the autocast that accelerate put around the module's forward pass."""
        self.module.__dict__.pop("forward", None)
        self.module.__dict__.pop("_original_forward", None)


def start_accelerate(device: torch.device, group: ProcessGroup, precision: str, **options: Any) -> Accelerator:
    """An `Accelerator` for `device` that counts the processes of `group`.

    Accelerate keeps one state per process and refuses a second precision, but a process may make several runs
    (nano's stages, tests), so the state of the one before is dropped. Its process state, with `cpu` by the device, is
    made before the `Accelerator`: one for DeepSpeed must not get `cpu=True`, and without it and without a GPU would
    count every process as number 0 of 1 and train as many separate models.

    Raises:
        ConfigError: a precision that the device does not have. TrainingError: accelerate counts other processes.
    """
    from accelerate import Accelerator, PartialState

    stop_accelerate()
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    PartialState(cpu=device.type == "cpu")
    try:
        accelerator = Accelerator(mixed_precision=_MIXED[precision], **options)
    except ValueError as error:
        raise ConfigError(f"precision {precision}: {first_line(error)}.") from error
    expected = environment_number("WORLD_SIZE", 1) if group.world == 1 else group.world
    if (accelerator.num_processes, accelerator.process_index) != (expected, group.rank):
        raise TrainingError(f"accelerate sees process {accelerator.process_index} of {accelerator.num_processes}, but "
                            f"this is process {group.rank} of {expected} (WORLD_SIZE).")
    return accelerator


def stop_accelerate() -> None:
    """Reset accelerate's state of this process (by its own function, which has no public name)."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_TORCH_DEVICE", "FSDP_VERSION"):
        os.environ.pop(name, None)


@contextmanager
def keeping_hyperparameters(optimizer: Any) -> Iterator[None]:
    """torch restores an optimiser's weight decay and betas with its moments; inside, this run's settings win."""
    own = [{key: value for key, value in group.items() if key in _GIVEN} for group in optimizer.param_groups]
    yield
    for group, given in zip(optimizer.param_groups, own, strict=True):
        group.update(given)


def _restore_strides(optimizer: Any) -> None:
    """Give an optimiser's loaded moments the memory layout of their parameters (channels last), as they had it: files
    keep tensors contiguous, and other loops over memory round differently."""
    for part in getattr(optimizer, "parts", {"": optimizer}).values():
        for parameter, state in part.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and (
                        value.stride() != parameter.stride()):
                    state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's global generators of the CPU and of `device`.

    `torch.manual_seed` does the same for every kind of device, and for those not in use it records the call stack each
    time: about 0.4 ms, as much as a small model's whole step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def _trained_parameters(task: Task, optimizer: Any) -> list[nn.Parameter]:
    """The optimiser's parameters in the order of the module.

    Raises:
        ConfigError: the optimiser trains parameters outside the module, which no checkpoint would hold.
    """
    wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [p for p in task.module.parameters() if id(p) in wanted]
    if len(trained) < len(wanted):
        raise ConfigError(f"[{task.name}] the optimiser trains {len(wanted) - len(trained)} tensors that are not in "
                          "the trained modules, so they would not be saved.")
    return trained
