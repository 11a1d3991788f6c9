"""How large a step of the language model is: packed rows, micro-steps, and what fits the GPU.

Where the data settings leave `rows` open, they follow from the released micro-batches (`data.stream.released_size`).
Where the memory plan says that these do not fit the GPU, a micro-batch takes fewer rows and the step more micro-steps,
so that the tokens of a step stay the released ones. The first process decides for all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from seed_multimodal.data.stream.data_settings import LlmDataSettings
from seed_multimodal.data.stream.mixture import Mixture
from seed_multimodal.data.stream.released_size import ReleasedSize, released_size
from seed_multimodal.device import machine_memory
from seed_multimodal.errors import ConfigError, counted
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.llm.lora import recorded_lora
from seed_multimodal.training.llm.memory import GIB, Beside, LlamaSizes, MemoryPlan, Spread, memory_plan
from seed_multimodal.training.llm.model_settings import LlmModelSettings, find_folder
from seed_multimodal.training.llm.trainer_settings import TrainerSettings

_BASE_BYTES = {"8bit": 1.0, "4bit": 0.57}


def split_rows(rows: int, accumulate: int, fitting: int) -> tuple[int, int]:
    """Rows of a micro-batch and micro-steps of a step: as asked if the rows fit, else the division of all rows of the
    step that comes nearest to their number (of equally near ones the largest micro-batch)."""
    if rows <= fitting:
        return rows, accumulate
    whole, most = rows * accumulate, max(1, fitting)
    found = [(one, max(1, round(whole / one))) for one in range((most + 1) // 2, most + 1)]
    return min(found, key=lambda pair: (abs(pair[0] * pair[1] - whole), -pair[0]))


def _positions(settings: LlmDataSettings) -> int:
    """Of the largest micro-batch."""
    if settings.packing:
        return (settings.rows or 1) * settings.length
    return max(rows * length for rows, length in map(settings.padded_shape, range(len(settings.sources))))


class StepPlan:
    """Rows and micro-steps of one run. `accumulate`: micro-steps of a step, final once the data are open."""

    def __init__(self, trainer: TrainerSettings, model: LlmModelSettings, deepspeed: Mapping[str, Any] | None,
                 words: int, group: ProcessGroup, device: torch.device, beside: Beside | None = None) -> None:
        self.beside = beside or Beside()
        self.accumulate, self.group, self.device = trainer.gradient_accumulation_steps, group, device
        self.trainer, self.model, self.deepspeed, self.words = trainer, model, deepspeed, words
        memory = (trainer.memory_gib or 0) * GIB
        if not memory and device.type == "cuda" and torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(device).total_memory
        self.memory = min(one["memory"] for one in group.gather({"memory": memory})) or None  # of all devices
        self.size: ReleasedSize | None = None
        self.derived = False
        # A DeepSpeed file that sets the micro-steps itself is obeyed.
        self.may_split = deepspeed is None or deepspeed.get("gradient_accumulation_steps") in (None, "auto")

    def rows(self, mixture: Mixture) -> tuple[int, int]:
        """Rows of a packed micro-batch of the training data, where their settings leave them open, and how many would
        hold all tokens of a released one."""
        self.size = self._measured(mixture)
        length, self.derived = mixture.settings.length, True
        asked = 1 if self.size is None else self.size.rows(length)
        plan = self.memory_plan(asked * length)
        if plan is None or self.memory is None or not self.may_split:
            return asked, asked
        rows, self.accumulate = split_rows(asked, self.accumulate, plan.rows(self.memory, length))
        return rows, asked

    def held_out_rows(self, most: int) -> Callable[[Mixture], tuple[int, int]]:
        """As `rows` for evaluation data: at most the training's."""
        def rows(mixture: Mixture) -> tuple[int, int]:
            size = self._measured(mixture)
            asked = most if size is None else size.rows(mixture.settings.length)
            return min(most, asked), asked

        return rows

    def memory_plan(self, positions: int) -> MemoryPlan | None:
        """Plan of a process with micro-batches of so many positions; None for a model whose sizes are not known."""
        sizes = self._sizes()
        if sizes is None:
            return None
        model = self.model
        lora = model.lora if model.lora is not None or model.adapter is None else recorded_lora(
            find_folder(model.adapter))
        base = _BASE_BYTES.get(model.quantization or "", 4.0 if model.dtype in ("fp32", "float32") else 2.0)
        return memory_plan(sizes, self._spread(), lora=lora, precision=self.trainer.precision, base_bytes=base,
                           checkpointing=model.gradient_checkpointing, kernel=self.trainer.loss_kernel,
                           positions=positions, beside=self.beside)

    def check_machine(self, settings: LlmDataSettings) -> None:
        """Refuse micro-batches that do not fit this machine by the memory plan, where it trains on the CPU.

        Raises:
            ConfigError: they do not.
        """
        positions, memory = _positions(settings), machine_memory()
        plan = self.memory_plan(positions) if self.device.type == "cpu" and memory else None
        need = 0.0 if plan is None else plan.total(positions) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if memory and need > memory:
            raise ConfigError(f"data: a micro-batch of {positions:,} positions needs {need / GIB:,.0f} GiB, and this "
                              f"machine has {memory / GIB:,.1f} GiB of memory: lower rows (or batch_size) and raise "
                              "trainer.gradient_accumulation_steps.")

    def lines(self, settings: LlmDataSettings) -> list[str]:
        """What is said at the start: the size of a step, the released one, and the memory plan."""
        world, positions = self.group.world, _positions(settings)
        shared = f"{counted(self.accumulate, 'micro-step')} x {world} process{'es' if world > 1 else ''}"
        if settings.packing:
            rows = settings.rows or 1
            lines = [f"a step: {counted(rows, 'packed row')} of {settings.length:,} x {shared} = "
                     f"{positions * self.accumulate * world:,} positions."]
        else:
            lines = [f"a step: padded micro-batches of up to {positions:,} positions x {shared}."]
        return [*lines, *self._origin(settings), self._memory_line(positions)]

    def _origin(self, settings: LlmDataSettings) -> list[str]:
        """Where the rows come from."""
        if not self.derived:
            return []
        if self.size is None:
            return ["data.rows is open, and not every source has the batch_size and max_length that it would follow "
                    "from: one row a micro-batch (the published recipes have 22,960 to 32,768 positions with padding)."]
        asked, released = self.trainer.gradient_accumulation_steps, self.size
        wanted = released.tokens * asked * self.group.world
        line = (f"data.rows follows from the released micro-batches: {released.positions:,.0f} positions, of which "
                f"{released.tokens:,.0f} are tokens ({counted(released.measured, 'sequence')} measured); x {asked} x "
                f"{self.group.world} = {wanted:,.0f} useful tokens a step.")
        if (rows := released.rows(settings.length)) == settings.rows and asked == self.accumulate:
            return [line]
        return [line, f"{counted(rows, 'row')} x {asked} would not fit, so a step has {settings.rows} x "
                      f"{self.accumulate} instead."]

    def _memory_line(self, positions: int) -> str:
        plan = self.memory_plan(positions)
        if plan is None:
            return "memory plan: none, the model's sizes are not known."
        if self.memory is None:
            return f"memory plan: none on {self.device.type}, micro-batches stay as they are set."
        have, text = f"{self.memory / GIB:.1f} GiB of the device", plan.text(positions)
        fits = plan.rows(self.memory, positions) > 0
        return f"memory plan (an estimate): {text}, of {have}." if fits else (
            f"memory plan (an estimate): {text}, more than the {have} can safely hold; if memory runs out: fewer "
            f"data.rows and more trainer.gradient_accumulation_steps, trainer.gradient_checkpointing, a ZeRO stage.")

    def _measured(self, mixture: Mixture) -> ReleasedSize | None:
        """Measured by the first process alone, so that all have the same."""
        found = released_size(mixture) if self.group.first else None
        shared = self.group.gather({"size": None if found is None else list(vars(found).values())})[0]["size"]
        return None if shared is None else ReleasedSize(*shared)

    def _spread(self) -> Spread:
        if self.deepspeed is None:
            return Spread(self.group.world, 0)
        zero = self.deepspeed.get("zero_optimization") or {}
        states, weights = ((zero.get(f"offload_{part}") or {}).get("device", "none") != "none"
                           for part in ("optimizer", "param"))
        return Spread(self.group.world, int(zero.get("stage", 0)), True, states, weights)

    def _sizes(self) -> LlamaSizes | None:
        """Of the model that will be built; None if its folder does not say (building it will)."""
        from transformers import LlamaConfig

        try:
            if self.model.sizes is not None:
                given = {str(key): value for key, value in self.model.sizes.items()}
            else:
                given = json.loads((find_folder(str(self.model.path)) / "config.json").read_text(encoding="utf-8"))
            return LlamaSizes.of(LlamaConfig(**{**given, "vocab_size": self.words}), self.words)
        except (OSError, ValueError, TypeError, AttributeError, ArithmeticError):
            return None
