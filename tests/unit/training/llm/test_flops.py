"""FLOP counts equal those of torch's FlopCounterMode."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from llm_losses import packed_loss
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from seed_multimodal.training.llm.lora import add_lora
from seed_multimodal.training.llm.metrics import TokenMeter, token_flops

LENGTH = 40


def build(lora: bool) -> torch.nn.Module:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attn_implementation="eager",
        )
    )
    return add_lora(model, {"r": 4, "lora_dropout": 0.0}) if lora else model


@pytest.mark.parametrize("lora", [False, True])
def test_token_flops_equals_torchs_count(lora):
    model = build(lora)
    ids = torch.randint(3, 96, (2, LENGTH))
    batch = SimpleNamespace(input_ids=ids, labels=ids, position_ids=None, attention_mask=None)
    with FlopCounterMode(display=False) as counter:
        packed_loss(model, batch).sum.backward()
    body, head, attention = token_flops(model, LENGTH)
    tokens = ids.numel()
    learned = ids.numel() - 2
    # Eager attention also computes the masked half; rotary frequencies are a further, tiny product.
    expected = tokens * (body + 2 * attention) + learned * head
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.005)


def test_token_meter_counts_sequences_without_padding():
    """TFLOP/s times seconds equals torch's count for each sequence alone."""
    model = build(False)
    lengths = (5, 30, 11)
    padding = 50
    counted = 0
    for length in lengths:
        ids = torch.randint(3, 96, (1, length))
        batch = SimpleNamespace(input_ids=ids, labels=ids, position_ids=None, attention_mask=None)
        with FlopCounterMode(display=False) as counter:
            packed_loss(model, batch).sum.backward()
        counted += counter.get_total_flops()
    meter = TokenMeter()
    meter.flops = token_flops(model, 1.0)
    tokens = sum(lengths)
    learned = sum(lengths) - len(lengths)
    zero = torch.zeros(())
    batch_metrics = {
        "loss": zero,
        "text_sum": zero,
        "text_count": torch.tensor(float(learned)),
        "image_sum": zero,
        "image_count": zero,
        "tokens": tokens,
        "positions": tokens + padding,
        "squares": sum(length**2 for length in lengths),
    }
    metrics = meter.combine([batch_metrics], None, 0.1)
    meter.add(metrics, meter.shared(metrics))
    line = meter.rates(1, 1, 2.0, 1)
    masked = meter.flops[2] * batch_metrics["squares"]  # computed by eager attention
    assert line["tflops"] * 2.0 * 1e12 == pytest.approx(counted - masked, rel=0.005)
    assert (
        line["tokens_per_s"] == (tokens + padding) / 2 and line["useful_tokens_per_s"] == tokens / 2
    )
