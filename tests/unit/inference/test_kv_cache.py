"""The KV cache: what its rows hold, what new prompts reuse of them, and how many rows fit."""

from __future__ import annotations

import re

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny.language import random_llm

from seed_multimodal.errors import ConfigError
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.kv_cache import CacheSize, KVCache, plan_cache
from seed_multimodal.inference.prompt import GenerationSettings, Prompt

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
        free = re.escape(f"{budget / 2**30:.3g} GiB")
        with pytest.raises(ConfigError, match=free):
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
