"""Bases of today with random weights and a tokenizer of their own: LoRA on packed and on plain
sequences, saved, merged and loaded (answers: inference/test_architectures.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import TEXT_TEMPLATES
from llm_losses import packed_loss, rows
from tiny.language import random_llm, write_hub_tokenizer
from tiny.seed import SENTENCES

from seed_multimodal.data.decoders.base import SeededRandom
from seed_multimodal.data.decoders.chat import Chat
from seed_multimodal.language.hub_tokenizer import HubTokenizer
from seed_multimodal.language.llm import load_llm
from seed_multimodal.language.lora import merge_adapter
from seed_multimodal.training.llm.config import LlmModelSettings
from seed_multimodal.training.llm.loss import find_llama
from seed_multimodal.training.llm.model import build_llm, save_trained

N_CODES = 16
PER_IMAGE = 4
PADDING = 14  # rows of the base's tables behind its tokenizer's
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
# Architecture of `tiny.language`, its chat template, whether its small models tie the tables.
BASES = {
    "llama": ("llama3", True),
    "qwen3": ("qwen3", True),
    "smollm3": ("smollm3", True),
    "mistral": ("mistral", False),
    "phi3": ("phi3", False),
    "mistral sliding": ("mistral", False),
    "qwen3 sliding": ("qwen3", False),
}


def write_base(folder: Path, architecture: str) -> HubTokenizer:
    """A base of texts in `folder`, and its tokenizer with image tokens."""
    template, tied = BASES[architecture]
    write_hub_tokenizer(folder, SENTENCES, TEXT_TEMPLATES[template])
    tokenizer = HubTokenizer.create(folder, N_CODES, PER_IMAGE)
    llm = random_llm(
        architecture,
        tokenizer.vocabulary.n_text + PADDING,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        **tokenizer.special_ids,
    )
    llm.save_pretrained(folder)
    return tokenizer


def sequences(tokenizer: HubTokenizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of conversations about images, and of drawings."""
    decoder = Chat(tokenizer, {"template": "chat"})
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index, text in enumerate(SENTENCES[:3]):
        image = {"codes": [(index + code) % N_CODES for code in range(PER_IMAGE)]}
        contents = [["What is it?", image], [text], ["Draw it."], ["Here: ", image]]
        roles = ("user", "assistant", "user", "assistant")
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        sequence = decoder.decode({"messages": messages}, SeededRandom(0))
        pairs.append((torch.tensor(sequence.ids), torch.tensor(sequence.labels)))
    return pairs


def train(model: Any, pairs: list[tuple[torch.Tensor, torch.Tensor]], packed: bool) -> list[float]:
    """Three steps; the loss of each."""
    batches = [rows(ids[None], labels[None]) for ids, labels in pairs]
    if packed:
        ids, labels = (torch.cat(column)[None] for column in zip(*pairs, strict=True))
        positions = torch.cat([torch.arange(len(ids)) for ids, _ in pairs])[None]
        batches = [rows(ids, labels, positions)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.5)
    losses: list[float] = []
    for _ in range(3):
        parts = [packed_loss(model, batch) for batch in batches]
        loss = sum(part.sum for part in parts) / sum(part.count for part in parts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("architecture", BASES)
def test_base_trained_and_merged(architecture: str, tmp_path):
    tokenizer = write_base(tmp_path / "base", architecture)
    settings = LlmModelSettings(path=str(tmp_path / "base"), dtype="fp32", lora=LORA)

    # 1. Three steps, packed by the model's own attention, equal those of plain sequences.
    pairs = sequences(tokenizer)
    model = build_llm(settings, tokenizer, "cpu")
    losses = train(model, pairs, packed=True)
    plain = train(build_llm(settings, tokenizer, "cpu"), pairs, packed=False)
    assert losses == pytest.approx(plain, rel=1e-4)
    assert losses[2] < losses[0]

    # 2. Tied tables stay one matrix.
    llama = find_llama(model)
    is_tied = llama.config.tie_word_embeddings
    assert is_tied == BASES[architecture][1]
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == is_tied

    # 3. Merged and loaded, it has the trained model's scores.
    adapter = save_trained(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "base", adapter, tmp_path / "merged", tokenizer=tokenizer)
    merged = load_llm(tmp_path / "merged", tokenizer=tokenizer)
    assert merged.config.tie_word_embeddings == is_tied
    assert len(merged.get_input_embeddings().weight) == len(tokenizer)
    ids = pairs[0][0][None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(ids, use_cache=False).logits, expected)
