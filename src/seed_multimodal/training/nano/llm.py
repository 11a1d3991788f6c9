"""Stages `pretrain` and `sft`: a small LLaMA from scratch, captions in both directions, then instructions.

Batches of similar length: eight batches' worth of sequences are drawn together and sorted, so little is padding. Causal
attention with right padding needs no mask. The weights are a plain `LlamaForCausalLM` folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seed_multimodal.data.nano import NanoSet
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.training.loop import run_stage
from seed_multimodal.training.nano.config import NanoConfig, training_device
from seed_multimodal.training.nano.samples import IGNORED, PRETRAIN_SHARES, SFT_SHARES, SampleMaker, collate
from seed_multimodal.training.optimizers import MuonWithAdamW

GROUP = 8
TEXT_WEIGHT = 4.0  # an answer has eight tokens where a picture has 34; equal weights would teach mostly pictures


def build_llm(config: NanoConfig, vocabulary: int) -> Any:
    """An untrained LLaMA of the configured size with tied input and output embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = config.llm
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=sizes.width, intermediate_size=sizes.ffn, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, max_position_embeddings=sizes.positions, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=True, rms_norm_eps=1e-5))


@torch.no_grad()
def start_from_codebook(model: Any, codebook: Tensor, first_code: int, sections: int = 1) -> None:
    """Give codes that are neighbours in the codebook `[K, d]` neighbouring word embeddings.

    A fixed random projection of the codebook, at the size of the random start: the model then reads a code it has
    seldom seen as the like of others, instead of learning K unrelated words. Each section has a projection of its
    own, because what a direction means differs from position to position.
    """
    rows = model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    parts = codebook.reshape(sections, -1, codebook.shape[1])
    turn = torch.randn(sections, codebook.shape[1], rows.shape[1], generator=generator)
    projected = ((parts - parts.mean(1, keepdim=True)) @ turn).flatten(0, 1)
    spread = projected.std()
    if spread > 0:  # sections of a single code have nothing to say
        rows[first_code:first_code + len(codebook)] = projected * (rows[:first_code].std() / spread)


def token_losses(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of every learned token and which of them are image codes or brackets; both `[T]`."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    target = labels[:, 1:].flatten()
    learned = target != IGNORED
    logits = model.lm_head(hidden[:, :-1].flatten(0, 1)[learned])
    return F.cross_entropy(logits.float(), target[learned], reduction="none"), target[learned]


def train_llm(
    config: NanoConfig, name: str, nano: NanoSet, words: MultimodalTokenizer, codes: Tensor, train: Sequence[int],
    held_out: Sequence[int], work: Path, out: Path, start: Path | None, codebook: Tensor | None = None,
    sections: int = 1,
) -> dict[str, Any]:
    """Train on the pictures `train` (codes `[N, V, 32]`), continue from the folder `start` if given, save to `out`.

    Args:
        codebook: `[K, d]`, in `sections` parts; what the code words start from when there is no `start`.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(config.seed + 5)
    model = build_llm(config, words.vocabulary.size) if start is None else LlamaForCausalLM.from_pretrained(start)
    if start is None and codebook is not None:
        start_from_codebook(model, codebook, words.vocabulary.n_text, sections)
    device = training_device(config)
    model.to(device)
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # the fused bf16 kernel's backward is slow on CPUs
    settings = config.train_pretrain if name == "pretrain" else config.train_sft
    shares = PRETRAIN_SHARES if name == "pretrain" else SFT_SHARES
    maker = SampleMaker(nano, words, codes, train, "train")
    first_code = words.vocabulary.n_text
    tokens = {"seen": 0}

    @lru_cache(maxsize=2)
    def group(number: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        drawn = [maker.draw(shares, generator) for _ in range(GROUP * settings.batch_size)]
        drawn.sort(key=lambda s: len(s.ids))
        batches = [collate(drawn[i:i + settings.batch_size], config.llm.positions)
                   for i in range(0, len(drawn), settings.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def loss(step: int) -> tuple[Tensor, Mapping[str, float]]:
        ids, labels = group(step // GROUP)[step % GROUP]
        tokens["seen"] += int(ids.numel())
        values, target = token_losses(model, ids.to(device), labels.to(device))
        image = target >= first_code
        parts = {"text": float(values[~image].detach().mean()) if bool((~image).any()) else 0.0}
        if bool(image.any()):
            parts["image"] = float(values[image].detach().mean())
        weight = torch.where(image, 1.0, TEXT_WEIGHT)
        return (values * weight).sum() / weight.sum(), parts

    def finish() -> Mapping[str, Any]:
        model.cpu()
        model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model.save_pretrained(out)
        return {"parameters": sum(p.numel() for p in model.parameters()), "tokens_this_run": tokens["seen"],
                **held_out_losses(model, SampleMaker(nano, words, codes, held_out, "val"), shares, first_code)}

    optimizer = MuonWithAdamW(model, settings.lr, settings.weight_decay)
    return run_stage(name, model, loss, settings, work, finish, optimizer=optimizer)


@torch.no_grad()
def held_out_losses(model: Any, maker: SampleMaker, shares: dict[str, float], first_code: int) -> dict[str, float]:
    """Mean loss per text token and per image token on 128 sequences of held-out pictures."""
    generator = torch.Generator().manual_seed(0)
    values: list[Tensor] = []
    targets: list[Tensor] = []
    for _ in range(4):
        ids, labels = collate([maker.draw(shares, generator) for _ in range(32)], 512)
        value, target = token_losses(model, ids, labels)
        values.append(value)
        targets.append(target)
    value, image = torch.cat(values), torch.cat(targets) >= first_code
    return {"val_text_loss": round(value[~image].mean().item(), 4),
            "val_image_loss": round(value[image].mean().item(), 4)}
