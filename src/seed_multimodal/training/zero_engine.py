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
            except (
                RuntimeError,
                ValueError,
                LookupError,
                TypeError,
                AssertionError,
                OSError,
            ) as error:
                raise CheckpointError(
                    f"{folder}: its ZeRO shards cannot be read ({first_line(error)}); "
                    "they need the same model, optimizer and ZeRO stage."
                ) from error

    def _load_resharded(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Load this process's parts of the shards of another number of processes.

        header: DeepSpeed's state of the model, from the first one.
        """
        from deepspeed.utils.zero_to_fp32 import get_optim_files

        rank, world = self.group.rank, self.group.world
        weights_key, states_key = "single_partition_of_fp32_groups", "base_optimizer_state"
        if self.stage == 3:
            weights_key, states_key = "fp32_flat_groups", "optimizer_state_dict"

        # 1. (state, parameter) → its parts in all shards. Only those that are used below are read
        #    from the disk.
        parts = defaultdict(list)
        steps = set()
        shard: Any = {}
        files = get_optim_files(str(folder))
        for index, file in enumerate(files):
            shard = _read(file)["optimizer_state_dict"]
            states = shard[states_key]["state"]
            layout = self._layout(shard, header["param_shapes"], index, len(files))
            for group, addresses in enumerate(layout):
                flat = {"weight": shard[weights_key][group], **states[group]}
                steps.add(float(flat.pop("step")))
                for name, address in addresses.items():
                    for key, tensor in flat.items():
                        parts[key, name].append(tensor.narrow(0, address.start, address.numel))

        # 2. All shards are there, of one step and of this model.
        shapes = self.model._get_zero_param_shapes()
        sizes = {name: shape.numel() for group in shapes for name, shape in group.items()}
        keys = {key for key, _ in parts}
        expected = {(key, name): size for key in keys for name, size in sizes.items()}
        if {key: sum(map(len, tensors)) for key, tensors in parts.items()} != expected:
            raise ValueError("a shard is missing, or of another model")
        if len(steps) > 1:
            raise ValueError(f"they are of steps {sorted(steps)}")

        # 3. The shard that this process would have written.
        own = self.optimizer.state_dict()
        paddings = own.get("group_paddings", [0] * len(shapes))
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        weights, states = [], {}
        for group, addresses in enumerate(self._layout(own, shapes, rank, world)):
            size = own[weights_key][group].numel() + paddings[group]
            flat = {key: torch.zeros(size) for key in keys}
            for name, address in addresses.items():
                if self.stage == 3:
                    start = rank * parameters[name].ds_tensor.numel()
                else:
                    start = parameters[name]._hp_mapping.lp_fragment_address.start
                for key in keys:
                    part = flat[key].narrow(0, address.start, address.numel)
                    part.copy_(_section(parts[key, name], start, address.numel))
            weights.append(flat.pop("weight"))
            states[group] = {"step": torch.tensor(*steps), **flat}
        own |= {key: shard[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow")}
        own[weights_key] = weights
        own[states_key] = {**own[states_key], "state": states}

        # 4. DeepSpeed loads it; the weights in 16 bits follow those in fp32.
        buffers = {name: header["module"][name] for name, _ in self.module.named_buffers()}
        self.module.load_state_dict(buffers, strict=False)
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self.model, name, header[name])
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()
        self.optimizer.load_state_dict({rank: own}, load_from_fp32_weights=True)
        if self.stage == 3:
            self.optimizer.checkpoint_event_epilogue()
        else:
            self.optimizer.update_lp_params()

    def _layout(
        self,
        shard: Mapping[str, Any],
        shapes: Sequence[Mapping[str, torch.Size]],
        rank: int,
        world: int,
    ) -> Sequence[Mapping[str, Any]]:
        """Where the flat tensors of a process have its parts of parameters: for each group, name →
        DeepSpeed's `fragment_address`."""
        from deepspeed.utils.tensor_fragment import fragment_address

        if self.stage < 3:
            return shard["param_slice_mappings"]
        layout = []
        for group in shapes:
            start = 0
            addresses = {}
            for name, shape in group.items():
                padded = math.ceil(shape.numel() / world)
                numel = min(max(shape.numel() - rank * padded, 0), padded)
                addresses[name] = fragment_address(numel=numel, start=start)
                start += padded
            layout.append(addresses)
        return layout


def _read(file: str) -> Any:
    """A torch file of tensors and plain containers, its tensors mapped."""
    return torch.load(file, "cpu", weights_only=True, mmap=True)


def _section(parts: Sequence[Tensor], start: int, numel: int) -> Tensor:
    """`numel` numbers of concatenated tensors, from `start` on."""
    sections = []
    for part in parts:
        sections.append(part[max(start, 0) : max(start + numel, 0)])
        start -= len(part)
    return torch.cat(sections)


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
