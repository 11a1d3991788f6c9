"""The training engine of DeepSpeed, ZeRO 1, 2, 3, with the original's JSON files."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.device import DTYPES
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.training.config import ConfigNode, TrainerSettings
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.engine import Engine, keeping_hyperparameters
from seed_multimodal.training.optimizers import MuonWithAdamW, trained_parameters
from seed_multimodal.training.task import Task

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def resolve_deepspeed_config(
    config: ConfigNode, settings: TrainerSettings, *, world: int, rows: int, hidden_size: int
) -> tuple[JsonObject, list[str]]:
    """A DeepSpeed configuration with "auto" resolved, and remarks.

    rows: sequences of a micro-batch, for DeepSpeed's log.
    hidden_size: of the model, for bucket sizes as in transformers.

    Raises:
        ConfigError: no ZeRO stage, or a value that conflicts with the run's.
    """
    # Copy the blocks that are changed below, too.
    resolved: JsonObject = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()
    }
    zero = resolved.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise ConfigError("deepspeed: zero_optimization.stage must be 1, 2 or 3.")

    # 1. Optimizer and schedule are the trainer's.
    remarks = []
    for key in ("optimizer", "scheduler"):
        if resolved.pop(key, None) is not None:
            remarks.append(f"{key} of the DeepSpeed configuration is ignored: set in optim")

    # 2. Values that both configurations have must be equal.
    micro_steps = settings.gradient_accumulation_steps
    _set_shared(resolved, "gradient_accumulation_steps", micro_steps)
    _set_shared(resolved, "gradient_clipping", settings.max_grad_norm)
    for precision in ("bf16", "fp16"):
        block = resolved.setdefault(precision, {})
        _set_shared(block, "enabled", settings.precision == precision, label=precision)

    # 3. Batch sizes, and optimizers that DeepSpeed does not know.
    rows_key = "train_micro_batch_size_per_gpu"
    if resolved.get(rows_key) not in ("auto", None):
        rows = int(resolved[rows_key])
    resolved[rows_key] = rows
    resolved["train_batch_size"] = rows * micro_steps * world
    resolved["zero_allow_untested_optimizer"] = True
    resolved["zero_force_ds_cpu_optimizer"] = False

    # 4. Communication buckets, in elements.
    bucket_sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, size in bucket_sizes.items():
        if zero.get(key) == "auto":
            zero[key] = size
    return resolved, remarks


def _set_shared(block: JsonObject, key: str, value: float, label: str = "") -> None:
    """Set a value of the trainer.

    Raises ConfigError: the DeepSpeed configuration has another one.
    """
    if block.get(key, "auto") not in ("auto", value):
        raise ConfigError(
            f"deepspeed: {label or key} is {block[key]}, but {value} in trainer; make them equal."
        )
    block[key] = value


class ZeroEngine(Engine):
    """A task's module in DeepSpeed's engine; gradients, optimizer states and (stage 3) weights are
    sharded."""

    sharded = True

    def __init__(self, task: Task, group: ProcessGroup, device: torch.device) -> None:
        """Wrap a task's module. Raises ConfigError: an unsupported optimizer."""
        if isinstance(task.optimizer, MuonWithAdamW):  # ZeRO flattens the matrices that it needs
            raise ConfigError("optim: muon is not supported with DeepSpeed; use adamw or adamw_hf.")
        if task.settings.ema:
            raise ConfigError("trainer: ema is not supported with DeepSpeed.")
        assert task.deepspeed is not None
        self.config = task.deepspeed
        self.stage = int(self.config["zero_optimization"]["stage"])
        super().__init__(task, group, device)

    def _prepare(self) -> nn.Module:
        """DeepSpeed's engine."""
        self._environment = {name: os.environ.get(name) for name in LAUNCHER_VARIABLES}
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it at every step
        self._linear = nn.functional.linear
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # gloo does as well as a shared-memory collective, which needs a C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # The process group that exists.
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False)
        if self.stage == 3:
            shard_parameters(self.module, self.device, DTYPES[self.settings.precision], self.config)
        model, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=self.optimizer, config=dict(self.config)
        )
        return model

    def autocast(self) -> AbstractContextManager[object]:
        """No context: DeepSpeed casts itself."""
        return nullcontext()

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Set DeepSpeed's accumulation boundary."""
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradients of a micro-step."""
        self.model.backward(loss, scale_wrt_gas=False)
        if not last:
            self.model.step()  # no update, counts the micro-step

    def clip(self) -> None:
        """No-op: DeepSpeed clips in its step."""
        return

    def update(self) -> dict[str, float]:
        """Update the weights; returns the gradient norm before clipping."""
        self.model.step()
        return {"grad": float(self.model.get_global_grad_norm() or 0.0)}

    def weights(self) -> dict[str, Tensor]:
        """As the plain engine's, in 16 or 32 bits; with ZeRO-3 gathered, by all processes."""
        with_frozen = self.task.saves_frozen
        if self.stage == 3:
            gathered = self.model._zero3_consolidated_16bit_state_dict(
                exclude_frozen_parameters=not with_frozen
            )
            return gathered or {}
        return {
            name: parameter.detach()
            for name, parameter in self.module.named_parameters()
            if with_frozen or parameter.requires_grad
        }

    def close(self) -> None:
        """Reset the environment, for another run in this process."""
        # ZeRO-3 has replaced it for the whole process; quantised weights do not work with its own.
        nn.functional.linear = self._linear
        # Without a launcher, DeepSpeed has set the launcher's variables.
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)

    def save_shards(self, folder: Path, step: int) -> None:
        """Write this process's shards and `latest`; collective."""
        self.model.save_checkpoint(
            str(folder),
            tag=f"global_step{step}",
            client_state={},
            save_latest=True,
            exclude_frozen_parameters=True,
        )

    def load(self, folder: Path, step: int) -> None:
        """Load the shards, also of another number of processes.

        Raises CheckpointError: of another run, damaged or unsafe.
        """
        from deepspeed.utils.zero_to_fp32 import get_model_state_file

        shards = folder / f"global_step{step}"
        # torch.load would unpickle anything, so only known types are allowed in the shards.
        with _weights_only(), keeping_hyperparameters(self.optimizer):
            try:
                header = _read(get_model_state_file(str(shards), self.stage))
                if header["dp_world_size"] == self.group.world:
                    self.model.load_checkpoint(
                        str(folder), tag=shards.name, load_module_strict=False
                    )
                else:
                    self._load_resharded(shards, header)
            except (RuntimeError, ValueError, KeyError, AssertionError, OSError) as error:
                raise CheckpointError(
                    f"{folder}: its ZeRO shards cannot be read ({first_line(error)}); "
                    "they need the same model, optimizer and ZeRO stage."
                ) from error

    def _load_resharded(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Load this process's part of the shards of another number of processes.

        DeepSpeed's universal checkpoints are not used: a file for each parameter, state and
        process, and with ZeRO-3 all groups share one counter of steps, which then runs too fast.

        header: DeepSpeed's state of the model, of the first process.
        """
        from deepspeed.utils.zero_to_fp32 import get_optim_files

        optimizer: Any = self.optimizer
        if self.stage == 3:
            weights_key, states_key = "fp32_flat_groups", "optimizer_state_dict"
            flat_groups = optimizer.fp32_partitioned_groups_flat
        else:
            weights_key, states_key = "single_partition_of_fp32_groups", "base_optimizer_state"
            flat_groups = optimizer.single_partition_of_fp32_groups

        files = get_optim_files(str(folder))
        saved_shapes, shapes = header["param_shapes"], self.model._get_zero_param_shapes()
        units = self._units(saved_shapes)
        if len(files) != header["dp_world_size"] or units != self._units(shapes):
            raise ValueError("a shard is missing, or the trained parameters are others")

        # 1. The blocks of each state, of all units, process after process; read when they are used.
        blocks: dict[str, list[Tensor]] = defaultdict(list)
        steps = set()
        for file in files:
            shard = _read(file)["optimizer_state_dict"]
            for index, group in enumerate(saved_shapes):
                flat = {"weight": shard[weights_key][index], **shard[states_key]["state"][index]}
                steps.add(float(flat.pop("step")))
                for key, tensor in flat.items():
                    blocks[key] += tensor.split(self._sizes(group, len(files), len(tensor)))
        if len(steps) > 1:
            raise ValueError(f"they are of steps {sorted(steps)}")

        # 2. The shard that this process would have written.
        weights, states = [], {}
        first = 0
        for index, group in enumerate(shapes):
            sizes = self._sizes(group, self.group.world, len(flat_groups[index]))
            flat = {
                key: torch.cat(
                    [
                        _section(tensors[unit :: len(units)], self.group.rank, size)
                        for unit, size in enumerate(sizes, first)
                    ]
                )
                for key, tensors in blocks.items()
            }
            first += len(sizes)
            weights.append(flat.pop("weight"))
            states[index] = {"step": torch.tensor(*steps), **flat}
        shard[weights_key] = weights
        shard[states_key] = {**optimizer.state_dict()[states_key], "state": states}

        # 3. DeepSpeed loads it; the weights in 16 bits follow those in fp32.
        if self.stage == 3:
            optimizer.checkpoint_event_prologue()
        optimizer.load_state_dict({self.group.rank: shard}, load_from_fp32_weights=True)
        if self.stage == 3:
            optimizer.checkpoint_event_epilogue()
        else:
            optimizer.update_lp_params()

    def _units(self, shapes: Sequence[Mapping[str, torch.Size]]) -> Sequence[object]:
        """What is cut into equal blocks for the processes: each group of parameters, or each
        parameter (ZeRO-3)."""
        if self.stage < 3:
            return shapes
        return [item for group in shapes for item in group.items()]

    def _sizes(self, group: Mapping[str, torch.Size], world: int, size: int) -> list[int]:
        """Sizes of the blocks of a group in a process, which has `size` numbers of it."""
        if self.stage < 3:
            return [size]
        return [math.ceil(shape.numel() / world) for shape in group.values()]


def _read(file: str) -> Any:
    """A torch file of tensors and plain containers, its tensors mapped."""
    return torch.load(file, "cpu", weights_only=True, mmap=True)


def _section(blocks: Sequence[Tensor], index: int, size: int) -> Tensor:
    """The block with this index, if those of a unit are of `size` instead; padded by zeros."""
    start = index * size
    sections = []
    for block in blocks:
        sections.append(block[max(start, 0) : max(start + size, 0)])
        start -= len(block)
    section = torch.cat(sections)
    return nn.functional.pad(section, (0, size - len(section)))


def gather_full_weights(module: nn.Module) -> dict[str, Tensor]:
    """The trained weights in fp32 on the CPU, from DeepSpeed's shards of stages 1 and 2.

    Collective; call it before the engine is closed.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: safe_get_full_fp32_param(parameter).detach().float().cpu()
        for name, parameter in trained_parameters(module).items()
    }


def shard_parameters(
    module: nn.Module, device: torch.device, dtype: torch.dtype, config: ConfigNode
) -> None:
    """Cast and shard a module for ZeRO-3, one parameter after another.

    No process holds all weights in the run's precision or on its device. Weights on the CPU in the
    precision of their safetensors files are mapped memory until then, which the processes of a node
    share.
    """
    import deepspeed

    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)

    # `zero.Init` shards the first parameter and adds the method that shards the others.
    first: Any = None
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device, dtype)
        if first is None:
            deepspeed.zero.Init(
                module=nn.ParameterList([parameter]), config_dict_or_path=dict(config)
            )
            first = parameter
        else:
            first.convert_to_zero_parameters(param_list=[parameter])


@contextmanager
def _weights_only() -> Iterator[None]:
    """Restrict torch.load inside DeepSpeed to tensors, plain containers and DeepSpeed's loss
    scaler."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
