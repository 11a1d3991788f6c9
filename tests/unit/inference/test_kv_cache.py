"""The KV cache: what its rows hold, what new prompts reuse of them, and how many rows fit."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny.language import random_llm
from torch import nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.inference.backends.base import CacheSize, plan_cache
from seed_multimodal.inference.backends.torch import KVCache, TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt, PromptImage

MIB = 1 << 20
GREEDY = GenerationSettings(max_new_tokens=4, do_sample=False, constrain=False)
# Prompts begin with any part of two texts, so that rows share prefixes of all lengths.
TEXTS = tuple(np.random.default_rng(seed).integers(3, 300, 60).tolist() for seed in (0, 1))


@pytest.fixture(scope="module")
def llm():
    return random_llm("llama", 340)


def greedy(llm, prompt: list[int]) -> list[int]:
    """The answer without any cache: every token from a pass over all before it."""
    ids = list(prompt)
    while len(ids) < len(prompt) + GREEDY.max_new_tokens and ids[-1] != 2:
        with torch.inference_mode():
            ids.append(int(llm(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@st.composite
def prompts(draw) -> list[int]:
    start = draw(st.sampled_from(TEXTS))[: draw(st.sampled_from((0, 1, 15, 16, 17, 40, 60)))]
    return [1, *start, *draw(st.lists(st.integers(3, 300), max_size=20))]


@pytest.mark.slow
@settings(max_examples=40)
@given(waves=st.lists(st.lists(prompts(), min_size=1, max_size=3), min_size=2, max_size=5))
def test_cached_prefixes_equal_recomputed_ones(llm, tiny, waves):
    # One row too many or too few of another conversation changes this one's answer.
    engine = Engine(TorchBackend(llm, max_rows=3), tiny.tokenizer)
    for wave in waves:
        answers = engine.generate([Prompt(ids) for ids in wave], GREEDY)
        assert answers == [greedy(llm, ids) for ids in wave]


def step_of(optimizer: type, **options) -> Callable[[nn.Module], None]:
    def step(model):
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        optimizer(model.parameters(), lr=0.1, **options).step()
        model.zero_grad()

    return step


def add_to_data(model):
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)  # as peft merges an adapter


def adapter(method: str, *arguments) -> Callable[[nn.Module], None]:
    def change(model):
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                getattr(module, method)(*arguments)

    return change


ADAPTER_CHANGES = [
    adapter("enable_adapters", False),  # as the reference policy of training by rewards
    adapter("set_scale", "default", 50.0),
]


def load_other_weights(model):
    model.load_state_dict(random_llm("llama", 340, seed=1).state_dict())


@pytest.mark.parametrize(
    "change",
    [
        load_other_weights,
        add_to_data,
        step_of(torch.optim.AdamW),
        step_of(torch.optim.AdamW, fused=True),
        lambda model: model.to(torch.bfloat16).to(torch.float32).lm_head.weight.data.neg_(),
        *ADAPTER_CHANGES,
    ],
)
def test_answers_after_a_change_of_the_weights_are_those_of_a_fresh_engine(tiny, change):
    # Training by rewards samples between two steps: old keys would give another model's answers.
    torch.manual_seed(0)
    model = random_llm("llama", 340)
    if change in ADAPTER_CHANGES:
        inject_adapter_in_model(LoraConfig(init_lora_weights=False), model)
    engine = Engine(TorchBackend(model, max_rows=2), tiny.tokenizer)
    asked = [Prompt([1, *TEXTS[0]]), Prompt([1, *TEXTS[0], 5])]
    before = engine.generate(asked, GREEDY)
    running = iter(engine.submit(asked[0], replace(GREEDY, max_new_tokens=200)))
    next(running)
    change(model)
    fresh = Engine(TorchBackend(model), tiny.tokenizer).generate(asked, GREEDY)
    assert fresh != before
    assert engine.generate(asked, GREEDY) == fresh
    running.close()
    assert engine.generate(asked, GREEDY) == fresh


def test_forget_drops_prefixes(tiny):
    # Layers between an image and its embedding are not the language model's: `weights` has no news.
    scale = torch.ones(())
    model = random_llm("llama", 340)
    backend = TorchBackend(model, embed_features=lambda features: torch.cat(features) * scale)
    engine = Engine(backend, tiny.tokenizer)
    features = torch.randn(40, model.config.hidden_size)
    asked = [Prompt([1, *range(40), 5], [PromptImage(features, range(1, 41))])]
    before = engine.generate(asked, GREEDY)
    scale.fill_(-3.0)
    engine.forget()
    fresh = Engine(backend, tiny.tokenizer).generate(asked, GREEDY)
    assert engine.generate(asked, GREEDY) == fresh != before


@given(
    per_token=st.integers(1, MIB),
    context=st.integers(64, 4096),
    budget=st.integers(0, 64 << 30),
    max_rows=st.integers(1, 16),
)
def test_plan_cache_uses_its_budget(per_token, context, budget, max_rows):
    # Too much is out of memory at the first long prompt, too little a shorter context.
    tokens = budget // per_token
    if tokens < 64:  # no useful row
        with pytest.raises(ConfigError):
            plan_cache(per_token, context, budget, max_rows)
        return
    size = plan_cache(per_token, context, budget, max_rows)
    assert size.rows * size.length <= tokens
    # A position behind the context is for padding.
    assert size.capacity == size.length - 1 <= context
    if size.length <= context:
        assert (size.rows, size.length) == (1, tokens)
    else:
        assert size.rows == max_rows or (size.rows + 1) * size.length > tokens


def test_large_tables_take_no_memory_before_they_are_written():
    # A machine of 8 GiB starts with a cache of 4 GiB.
    cache = KVCache(CacheSize(32, 1024))
    before = psutil.Process().memory_info().rss
    cache.allocate(4, 8, 64, torch.float32, torch.device("cpu"))
    assert psutil.Process().memory_info().rss - before < 50 * MIB  # of 512
