"""Sample answers during training: continuations of a few sequences, with the targets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.disk import replace_text
from seed_multimodal.inference.image_constraints import ImageConstraints, ImageLogitsProcessor
from seed_multimodal.language.answer import AnswerReader
from seed_multimodal.language.messages import Answer
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.training.llm.loss import use_attention

COUNT = 4  # sequences
MAX_NEW_TOKENS = 48


def write_samples(
    file: Path, llama: Any, tokenizer: MultimodalTokenizer, batch: LlmBatch, embeds: Tensor
) -> str:
    """Write and return, for the first sequences of a batch, prompt, model's answer and target; `embeds` `[B, L, D]`:
    input embeddings of the batch, including images."""
    ids, rows = batch.input_ids.flatten().tolist(), embeds.flatten(0, -2)
    use_attention(llama, packed=False)
    blocks: list[str] = []
    for start, first, end in beginnings(batch, tokenizer)[:COUNT]:
        answer = greedy_answer(llama, tokenizer, rows[start:first])
        asked, made, learned = (
            Answer(AnswerReader(tokenizer).read_all(part).parts)
            for part in (ids[start:first], answer, ids[first:end])
        )
        blocks.append(f"{asked}\n  model:   {made}\n  learned: {learned}\n")
    file.parent.mkdir(exist_ok=True)
    replace_text(file, "\n".join(blocks))
    return "\n".join(blocks)


def greedy_answer(llama: Any, tokenizer: MultimodalTokenizer, embeds: Tensor) -> list[int]:
    """Greedy continuation of input embeddings `[n, D]`, with well-formed images; by transformers, since the model that
    is trained changes between two samples."""
    budget = min(MAX_NEW_TOKENS, llama.config.max_position_embeddings - len(embeds))
    if budget < 1:
        return []
    constraints = ImageLogitsProcessor(ImageConstraints(tokenizer.vocabulary), budget=budget)
    answer: list[int] = llama.generate(
        inputs_embeds=embeds[None],
        max_new_tokens=budget,
        do_sample=False,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        logits_processor=[constraints],
    )[0].tolist()
    return answer


def beginnings(batch: LlmBatch, tokenizer: MultimodalTokenizer) -> list[tuple[int, int, int]]:
    """Positions in the flattened batch of each sequence with targets: start, first target (after a leading target
    image), end."""
    words, found = tokenizer.vocabulary, list[tuple[int, int, int]]()
    ids, labels, positions = (
        one.flatten().tolist() for one in (batch.input_ids, batch.labels, batch.position_ids)
    )
    starts = [place for place, position in enumerate(positions) if position == 0]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        learned = [place for place in range(start + 1, end) if labels[place] >= 0]
        first = learned[0] if learned else end
        while first < end and (
            words.is_image_token(ids[first]) and words.boi_id in ids[start : start + 3]
        ):
            first += 1
        if first <= max(learned, default=-1):
            found.append((start, first, learned[-1] + 1))
    return found


@contextmanager
def record_embeds(llama: Any) -> Iterator[list[Tensor]]:
    """Context that records the decoder's input embeddings, `[B, L, D]` per forward pass."""

    def keep(module: Any, arguments: Any, given: dict[str, Any]) -> None:
        embeds = given.get("inputs_embeds")
        found.append(module.embed_tokens(given["input_ids"]) if embeds is None else embeds)

    found = list[Tensor]()
    with llama.model.register_forward_pre_hook(keep, with_kwargs=True):
        yield found
