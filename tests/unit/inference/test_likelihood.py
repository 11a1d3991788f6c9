"""Likelihoods of continuations equal those of one pass of transformers, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seed_multimodal.errors import GenerationError
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt

TEXTS = ("What is this animal?", "no", "Please draw a fish.")
ANSWERS = (["a cat", "a red apple under the tree"], ["blue"], ["Here it is.", "a", "cat"])


def log_probs(system: Any, prompt: list[int], ids: list[int]) -> tuple[list[float], bool]:
    """By one pass; and whether each id is the likeliest one."""
    with torch.no_grad():
        scores = system.llm(torch.tensor([[*prompt, *ids]])).logits[0].float()
    scores = scores[len(prompt) - 1 : -1, : system.tokenizer.vocabulary.size].log_softmax(-1)
    chosen = scores[range(len(ids)), ids]
    return chosen.tolist(), scores.argmax(-1).tolist() == ids


@pytest.mark.parametrize("max_rows", [2, 16])
@pytest.mark.parametrize("family", ["tiny", "tiny_x", "tiny_lavit"])
def test_likelihoods_equal_those_of_one_pass(request, family, max_rows):
    system = request.getfixturevalue(family)
    encode = system.tokenizer.encode
    engine = Engine(TorchBackend(system.llm, max_rows=max_rows), system.tokenizer)
    prompts = [encode(text, add_bos=True) for text in TEXTS]
    continuations = [[encode(answer) for answer in answers] for answers in ANSWERS]
    # What the model would answer itself.
    settings = GenerationSettings(max_new_tokens=3, do_sample=False, constrain=False)
    continuations[0] += engine.generate([Prompt(prompts[0])], settings, end_ids=())
    likelihoods = engine.likelihoods([Prompt(ids) for ids in prompts], continuations)
    assert likelihoods[0][2].is_greedy
    for prompt, rows, measured in zip(prompts, continuations, likelihoods, strict=True):
        for ids, likelihood in zip(rows, measured, strict=True):
            expected, is_greedy = log_probs(system, prompt, ids)
            assert likelihood.log_probs == pytest.approx(expected, abs=1e-3)
            assert likelihood.is_greedy == is_greedy
            assert likelihood.mean == pytest.approx(sum(expected) / len(ids), abs=1e-3)


def test_likelihoods_that_cannot_be_computed(tiny):
    engine = Engine(TorchBackend(tiny.llm, max_rows=2), tiny.tokenizer)
    prompt = Prompt([1] * (engine.capacity - 2))
    with pytest.raises(GenerationError):
        engine.likelihoods([prompt], [[[5, 6, 7]]])
