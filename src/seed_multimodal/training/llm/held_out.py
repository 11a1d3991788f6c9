"""Evaluation data of a language model's run: the first micro-batches of an evaluation mixture, kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seed_multimodal.data.stream.config import read_data_settings, with_template
from seed_multimodal.data.stream.llm_batches import LlmBatch, LlmBatches
from seed_multimodal.data.stream.mixture import EndOfData
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.engine import Engine
from seed_multimodal.training.llm.loss import IGNORED
from seed_multimodal.training.llm.trainer_settings import RunSettings


def held_out(run: RunSettings, tokenizer: MultimodalTokenizer, group: ProcessGroup, log: Callable[[str], None],
             template: str | None = None) -> list[LlmBatch] | None:
    """Evaluation batches, read before the first step so that mistakes in them show at once; None: no evaluation.

    `template`: of prompts, where the evaluation data leave it open.
    """
    if run.eval_data is None or not run.trainer.eval_steps:
        if run.trainer.eval_steps:
            log("trainer.eval_steps is set, but there is no eval_data: nothing is evaluated.")
        elif run.eval_data is not None:
            log("there is eval_data, but trainer.eval_steps is 0: nothing is evaluated.")
        return None
    settings = with_template(read_data_settings(run.eval_data, "eval_data"), template)
    with LlmBatches(settings, tokenizer, rank=group.rank, world=group.world) as batches:
        return first_batches(batches, run.trainer.eval_batches)


def first_batches(batches: LlmBatches, count: int, start: int = 0) -> list[LlmBatch]:
    """`count` micro-batches from number `start` on, fewer if the data end before."""
    found: list[LlmBatch] = []
    try:
        for number in range(start, start + count):
            found.append(batches.at(number))
    except EndOfData:
        pass
    return found


def blank_batch() -> LlmBatch:
    """A batch with nothing to learn, for a process whose data have ended before the others'."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    # As a padded batch: the attention of packed rows may be compiled for each length.
    return LlmBatch(ids, torch.full_like(ids, IGNORED), torch.arange(2)[None], torch.ones_like(ids), tokens=0,
                    learned=0, sequences=0, images=0, squares=0)


class HeldOutLosses:
    """What an evaluation adds up of each batch, and the line of the log that the sums give."""

    def sums(self, engine: Engine, batch: LlmBatch) -> Tensor:
        """Six sums of a batch: the weighted loss and count, those of text and of image tokens."""
        one = batch.to(engine.device)
        with engine.autocast():
            parts = engine.model(one.input_ids, one.labels, one.position_ids, one.attention_mask)
        return torch.stack([part.float() for part in parts])

    def line(self, total: float, count: float, text: float, text_count: float, image: float, image_count: float
             ) -> dict[str, float]:
        """Means of the sums over all batches; empty if nothing is learned in them."""
        if not text_count + image_count:
            return {}
        found = {"eval_loss": total / max(count, 1e-8)}
        if image_count:
            found |= {"eval_text_loss": text / max(text_count, 1), "eval_image_loss": image / image_count}
        return found


def evaluate(engine: Engine, group: ProcessGroup, batches: Sequence[LlmBatch], losses: HeldOutLosses
             ) -> dict[str, float]:
    """Mean losses over the batches of all processes, without gradients; empty if there is nothing to learn in them.

    Every process makes as many forward passes as the one with the most batches: under DDP and ZeRO-3 each is a
    collective operation, and finite data may give the processes different numbers of batches.
    """
    most = max(answer["batches"] for answer in group.gather({"batches": len(batches)}))
    engine.model.eval()
    sums = torch.zeros(6, dtype=torch.float64)
    with torch.no_grad():
        for batch in [*batches, *[blank_batch()] * (most - len(batches))]:
            sums += losses.sums(engine, batch).cpu().double()  # Apple GPUs have no fp64
    engine.model.train()
    return losses.line(*group.sum(sums.tolist()))
