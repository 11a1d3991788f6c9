"""One optimiser step of all processes: micro-batches, one loss, agreement, and only then new weights.

With packed data each learned token of a step weighs the same wherever it lies: the processes add up their counts before
the first backward pass. Else the micro-batches' means are averaged, as released. Nothing is moved until all processes
know that the loss of all is finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatch, LlmBatches
from seed_multimodal.data.stream.mixture import EndOfData
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.training.llm.engine import PlainEngine
from seed_multimodal.training.llm.loss import IGNORED, LossWeights, learned_targets
from seed_multimodal.training.llm.metrics import StepNumbers
from seed_multimodal.training.llm.optim import OptimSettings, schedule
from seed_multimodal.training.llm.processes import Processes
from seed_multimodal.training.llm.trainer_settings import RunSettings, TrainerSettings
from seed_multimodal.training.llm.zero import ZeroEngine
from seed_multimodal.training.step import seed_generators

_LEAST = 1e-8  # of a step with nothing to learn


@dataclass
class StepResult:
    """What came of a step: its numbers, or why there are none. `stopped`: some process was asked to stop."""

    numbers: StepNumbers | None = None
    problem: str = ""
    stopped: bool = False
    ended: bool = False


class OptimizerStep:
    """Makes steps by number.

    Args:
        by_tokens: one mean over the learned tokens of the step, else the mean of micro-batches' means.
    """

    def __init__(self, engine: PlainEngine | ZeroEngine, data: LlmBatches, settings: TrainerSettings,
                 optim: OptimSettings, processes: Processes, weights: LossWeights, *, by_tokens: bool) -> None:
        self.engine, self.data, self.settings, self.optim = engine, data, settings, optim
        self.processes, self.weights, self.by_tokens = processes, weights, by_tokens

    def make(self, step: int, *, broken: bool = False, stop: bool = False) -> StepResult:
        """Step number `step`, from 0; every process calls it.

        Args:
            broken: this process cannot go on (a file that was not written): nobody moves weights.
            stop: this process was asked to stop.
        """
        count = self.settings.gradient_accumulation_steps
        batches = self._batches(step)
        learned = [self._count(batch) for batch in batches]
        total, left = self.processes.peers.sum([sum(learned), float(len(batches))])
        if not left:
            return StepResult(ended=True)
        mine = self._gradients(step, batches, total, left / self.processes.world)
        norm = self.engine.gradient_norm()
        problem = f"The loss became {mine[0]}" if not math.isfinite(mine[0]) else self.engine.problem(norm)
        sums = self.processes.peers.sum([*mine, float(bool(problem) or broken), float(stop)])
        if sums[-2] or not math.isfinite(sums[0]):
            return StepResult(problem=problem or "Another process could not make its part")
        rate = schedule(step, self.optim, self.settings.max_steps, count)
        moved = self.engine.update(rate)
        norm = moved if moved is not None else norm
        loss = sums[0] / (max(total, _LEAST) if self.by_tokens else self.processes.world)
        text_sum, text_count, image_sum, image_count, tokens, positions, sequences = sums[1:8]
        numbers = StepNumbers(loss, text_sum, text_count, image_sum, image_count, tokens, positions, sequences, rate,
                              math.nan if norm is None else norm)
        return StepResult(numbers, self.engine.problem(norm), bool(sums[-1]))

    def evaluate(self, batches: Sequence[LlmBatch]) -> list[float]:
        """Sums over all processes: loss, count, then loss and count of text and of image tokens; no gradients.

        Every process makes as many forward passes as the one with the most batches: under DDP and ZeRO-3 each is an
        exchange, and data that end do not end at the same batch for all.
        """
        own = len(batches)
        most = max(answer["batches"] for answer in self.processes.peers.gather({"batches": own}))
        batches = [*batches, *[_blank()] * (most - own)]
        self.engine.model.eval()
        sums = torch.zeros(6, dtype=torch.float64)
        with torch.no_grad():
            for batch in batches:
                parts = self.engine.forward(batch.to(self.processes.device))
                sums += torch.stack([part.float() for part in parts]).cpu().double()  # Apple GPUs have no fp64
        self.engine.model.train()
        return self.processes.peers.sum(sums.tolist())

    def _batches(self, step: int) -> list[LlmBatch]:
        """The micro-batches of a step: fewer in the one in which this process's data end, none after it."""
        count, found = self.settings.gradient_accumulation_steps, []
        try:
            for micro in range(count):
                found.append(self.data.at(step * count + micro))
        except EndOfData:
            pass
        return found

    def _count(self, batch: LlmBatch) -> float:
        """Weighted number of learned tokens."""
        targets = learned_targets(batch.labels, None if batch.attention_mask is not None else batch.position_ids)
        learned = int((targets != IGNORED).sum())
        images = int((targets >= self.weights.first_code).sum())
        return self.weights.text * (learned - images) + self.weights.image * images

    def _gradients(self, step: int, batches: Sequence[LlmBatch], total: float, each: float) -> list[float]:
        """Backward passes; sums of this process: loss, text and image parts, tokens, positions, sequences.

        Args:
            total: learned tokens of all processes.
            each: micro-batches that a process has, on average. One that has fewer than the others fills up with blank
                ones, since each pass may be an exchange.
        """
        count, device = self.settings.gradient_accumulation_steps, self.processes.device
        share = self.processes.world / max(total, _LEAST) if self.by_tokens else 1.0 / each
        found = []
        for micro, batch in enumerate([*batches, *[_blank()] * (count - len(batches))]):
            # Processes differ by more than any number of micro-steps, so no two draw the same numbers.
            seed_generators(self.settings.seed * 1_000_003 + step * count + micro
                            + self.processes.rank * 1_000_003**2, device)
            last = micro == count - 1
            with self.engine.accumulating(last):
                parts = self.engine.forward(batch.to(device))
                value = parts.sum if self.by_tokens else parts.mean
                self.engine.backward(value * (share * self.engine.loss_factor), last)
            shown = value.detach() if self.by_tokens else value.detach() / each
            found.append(torch.stack([shown.float(), *(part.detach().float() for part in parts[2:])]))
        numbers = torch.stack(found).cpu().double().sum(0).tolist()  # one transfer from the device, which waits for it
        return [*numbers, *(float(sum(values)) for values in (
            [batch.tokens for batch in batches], [batch.input_ids.numel() for batch in batches],
            [batch.sequences for batch in batches]))]


def _blank() -> LlmBatch:
    """A batch with nothing to learn."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return LlmBatch(ids, torch.full_like(ids, IGNORED), torch.arange(2)[None], None, tokens=0, learned=0, sequences=0,
                    images=0)


def held_out(run: RunSettings, tokenizer: MultimodalTokenizer, processes: Processes, log: Callable[[str], None]
             ) -> list[LlmBatch] | None:
    """What a run evaluates, read before its first step, so that a mistake in it shows then; None: nothing."""
    if run.eval_data is None or not run.trainer.eval_steps:
        if run.trainer.eval_steps:
            log("trainer.eval_steps is set, but there is no eval_data: nothing is evaluated.")
        elif run.eval_data is not None:
            log("there is eval_data, but trainer.eval_steps is 0: nothing is evaluated.")
        return None
    settings = read_data_settings(run.eval_data, "eval_data")
    with LlmBatches(settings, tokenizer, rank=processes.rank, world=processes.world) as batches:
        return first_batches(batches, run.trainer.eval_batches)


def first_batches(batches: LlmBatches, count: int) -> list[LlmBatch]:
    """The first micro-batches, fewer if the data end before."""
    found: list[LlmBatch] = []
    try:
        for number in range(count):
            found.append(batches.at(number))
    except EndOfData:
        pass
    return found
