"""FLOP counts equal those of torch's FlopCounterMode."""

import pytest
import torch
from llm_losses import packed_loss, rows
from tiny.language import random_llm
from torch.utils.flop_counter import FlopCounterMode

from seed_multimodal.training.llm.lora import add_lora
from seed_multimodal.training.llm.metrics import token_flops

LENGTH = 33  # two rows have 64 learned tokens: none are filled up (`head_losses`)


def build(lora: bool) -> torch.nn.Module:
    model = random_llm("llama", 96, num_hidden_layers=3, attn_implementation="eager")
    return add_lora(model, {"r": 4, "lora_dropout": 0.0}) if lora else model


@pytest.mark.parametrize("lora", [False, True])
def test_token_flops_equals_torchs_count(lora):
    # The figures of TFLOP/s in the log are compared with those of other trainers.
    model = build(lora)
    ids = torch.randint(3, 96, (2, LENGTH))
    with FlopCounterMode(display=False) as counter:
        packed_loss(model, rows(ids)).sum.backward()
    body, head, attention = token_flops(model, LENGTH)
    tokens = ids.numel()
    learned = ids.numel() - 2
    # Eager attention also computes the masked half; rotary frequencies are a further, tiny product.
    expected = tokens * (body + 2 * attention) + learned * head
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.005)
