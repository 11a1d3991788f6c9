"""Sample answers during training: continuations of a few sequences, with the targets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seed_multimodal.data.stream.llm_batches import LlmBatch
from seed_multimodal.disk import replace_text
from seed_multimodal.inference.sampling import ImageConstraints
from seed_multimodal.language.answer import Answer, AnswerReader
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.language.vocabulary import ImageGrammar
from seed_multimodal.training.llm.loss import use_attention

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

COUNT = 4  # sequences
MAX_NEW_TOKENS = 48


def write_samples(
    file: Path, llama: LlamaForCausalLM, tokenizer: TextTokenizer, batch: LlmBatch, embeds: Tensor
) -> str:
    """Write and return, for the first sequences of a batch, prompt, model's answer and target.

    embeds: input embeddings of the batch `[B, L, D]`, including images.
    """
    ids = batch.input_ids.flatten().tolist()
    rows = embeds.flatten(0, -2)  # [B · L, D]
    use_attention(llama, packed=False)
    blocks: list[str] = []
    for start, target, end in prompt_spans(batch, tokenizer)[:COUNT]:
        prompt_text = _display(tokenizer, ids[start:target])
        answer_text = _display(tokenizer, greedy_answer(llama, tokenizer, rows[start:target]))
        target_text = _display(tokenizer, ids[target:end])
        blocks.append(f"{prompt_text}\n  model:   {answer_text}\n  learned: {target_text}\n")
    text = "\n".join(blocks)
    file.parent.mkdir(exist_ok=True)
    replace_text(file, text)
    return text


def _display(tokenizer: TextTokenizer, ids: list[int]) -> str:
    return str(Answer(AnswerReader(tokenizer).read_all(ids).parts))


def greedy_answer(llama: LlamaForCausalLM, tokenizer: TextTokenizer, embeds: Tensor) -> list[int]:
    """Greedy continuation of input embeddings `[n, D]`, with well-formed images.

    By transformers, since the model that is trained changes between two samples.
    """
    budget = min(MAX_NEW_TOKENS, llama.config.max_position_embeddings - len(embeds))
    if budget < 1:
        return []
    # Images have all their codes, and end before the budget.
    constraints = ImageConstraints([ImageGrammar(tokenizer.vocabulary, budget=budget)])
    # Each length would be compiled anew.
    with torch.compiler.set_stance("force_eager"):
        return llama.generate(
            inputs_embeds=embeds[None],
            max_new_tokens=budget,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=[constraints],
        )[0].tolist()


def prompt_spans(batch: LlmBatch, tokenizer: TextTokenizer) -> list[tuple[int, int, int]]:
    """Positions in the flattened batch of each sequence with targets: start, first target, end.

    A target image at the beginning belongs to the prompt.
    """
    vocabulary = tokenizer.vocabulary
    ids = batch.input_ids.flatten().tolist()
    labels = batch.labels.flatten().tolist()
    position_ids = batch.position_ids.flatten().tolist()

    # Positions restart at 0 in each sequence.
    starts = [index for index, position in enumerate(position_ids) if position == 0]
    spans: list[tuple[int, int, int]] = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        learned = [index for index in range(start + 1, end) if labels[index] >= 0]
        if not learned:
            continue
        # Skip a target image right after the start.
        target = learned[0]
        if vocabulary.boi_id in ids[start : start + 3]:
            while target < end and vocabulary.is_image_token(ids[target]):
                target += 1
        if target <= learned[-1]:
            spans.append((start, target, learned[-1] + 1))
    return spans


@contextmanager
def record_embeds(llama: LlamaForCausalLM) -> Iterator[list[Tensor]]:
    """Context that records the decoder's input embeddings, `[B, L, D]` per forward pass."""
    embeds: list[Tensor] = []

    def record(decoder: nn.Module, inputs: Any, arguments: dict[str, Any]) -> None:
        inputs_embeds = arguments.get("inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = llama.get_input_embeddings()(arguments["input_ids"])
        embeds.append(inputs_embeds)

    with llama.model.register_forward_pre_hook(record, with_kwargs=True):
        yield embeds
