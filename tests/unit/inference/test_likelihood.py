"""Likelihoods of continuations equal those of transformers' scores, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_images import noise

from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.base_engine import BaseEngine
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt

TEXTS = ("What is this animal?", "no", "Please draw a fish.")
ANSWERS = (["a cat", "a red apple under the tree"], ["blue"], ["Here it is.", "a", "cat"])


@pytest.fixture(params=("tiny", "tiny_x", "tiny_lavit"))
def system(request) -> Any:
    return request.getfixturevalue(request.param)


def log_probs(system: Any, prompt: list[int], ids: list[int]) -> tuple[list[float], bool]:
    """By one pass of transformers."""
    with torch.no_grad():
        scores = system.llm(torch.tensor([[*prompt, *ids]])).logits[0].float()
    scores = scores[len(prompt) - 1 : -1, : system.tokenizer.vocabulary.size].log_softmax(-1)
    expected = torch.tensor(ids)
    return scores.gather(1, expected[:, None])[:, 0].tolist(), bool(
        (scores.argmax(-1) == expected).all()
    )


@pytest.mark.parametrize("max_rows", [2, 16])
def test_likelihoods_equal_those_of_one_pass(system, max_rows):
    encode = system.tokenizer.encode
    engine = Engine(TorchBackend(system.llm, max_rows=max_rows), system.tokenizer)
    prompts = [encode(text, add_bos=True) for text in TEXTS]
    continuations = [[encode(answer) for answer in answers] for answers in ANSWERS]
    # What the model would say is the likeliest first token.
    [greedy] = engine.generate(
        [Prompt(prompts[0])],
        GenerationSettings(max_new_tokens=3, do_sample=False, constrain=False),
        end_ids=(),
    )
    continuations[0].append(greedy)
    found = engine.likelihoods([Prompt(ids) for ids in prompts], continuations)
    assert [len(row) for row in found] == [3, 1, 3]
    for prompt, rows, likelihoods in zip(prompts, continuations, found, strict=True):
        for ids, likelihood in zip(rows, likelihoods, strict=True):
            expected, is_greedy = log_probs(system, prompt, ids)
            assert likelihood.log_probs == pytest.approx(expected, abs=1e-3)
            assert likelihood.is_greedy == is_greedy
            assert likelihood.mean == pytest.approx(sum(expected) / len(ids), abs=1e-3)
    assert found[0][2].is_greedy


def test_likelihoods_that_do_not_fit(tiny):
    engine = Engine(TorchBackend(tiny.llm, max_rows=2), tiny.tokenizer)
    prompt = Prompt([1] * (engine.capacity - 2))
    with pytest.raises(GenerationError, match="does not fit the KV cache"):
        engine.likelihoods([prompt], [[[5, 6, 7]]])
    with pytest.raises(ConfigError, match="not by a server"):
        BaseEngine.likelihoods(engine, [], [])


def test_a_verdict_stands_before_the_answer(tiny, monkeypatch):
    """The answer is compared after the verdict that the system itself generates."""
    tokenizer = tiny.tokenizer
    verdict = tokenizer.encode("a fish: yes -")
    monkeypatch.setattr(tiny, "answer_after", " - ")
    monkeypatch.setattr(
        tiny, "generate", lambda *_, **__: [[*verdict, *tokenizer.encode("no")], [5, 6]]
    )
    images = [noise(1), noise(2)]
    [[after], [plain]] = tiny.likelihoods(images, "Is it?", [["yes"], ["yes"]])
    monkeypatch.setattr(tiny, "answer_after", "")
    conversations = tiny.build_prompts
    seen: list[Prompt] = []

    def recorded(*arguments: Any) -> list[Prompt]:
        seen[:] = conversations(*arguments)
        return seen

    monkeypatch.setattr(tiny, "build_prompts", recorded)
    [_, [same]] = tiny.likelihoods(images, "Is it?", [["yes"], ["yes"]])
    assert plain.log_probs == pytest.approx(same.log_probs, abs=1e-4)
    expected, _ = log_probs(tiny, [*seen[0].ids, *verdict], tokenizer.encode("yes"))
    assert after.log_probs == pytest.approx(expected, abs=1e-3)
