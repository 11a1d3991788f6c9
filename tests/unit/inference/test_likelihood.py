"""Likelihoods of continuations and of sampled tokens equal those of one pass of transformers."""

from dataclasses import replace

import pytest
import torch
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor
from yaml_tables import read_tables

from seed_multimodal.errors import ConfigError, GenerationError
from seed_multimodal.inference.backends.torch import TorchBackend
from seed_multimodal.inference.engine import Engine
from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.inference.sampling import ImageConstraints, build_warpers
from seed_multimodal.language.vocabulary import ImageGrammar

TEXTS = ("What is this animal?", "no", "Please draw a fish.")
ANSWERS = (["a cat", "a red apple under the tree"], ["blue"], ["Here it is.", "a", "cat"])


GREEDY = GenerationSettings(max_new_tokens=3, do_sample=False, constrain=False, stop_token_ids=())


@pytest.mark.parametrize("max_rows", [2, 16])
@pytest.mark.parametrize("family", ["tiny", "tiny_x", "tiny_lavit"])
def test_likelihoods_equal_those_of_one_pass(request, family, max_rows):
    system = request.getfixturevalue(family)
    encode = system.tokenizer.encode
    engine = Engine(TorchBackend(system.llm, max_rows=max_rows), system.tokenizer)
    prompts = [Prompt(encode(text, add_bos=True)) for text in TEXTS]
    continuations = [[encode(answer) for answer in answers] for answers in ANSWERS]
    continuations[0] += engine.generate([prompts[0]], GREEDY)  # what the model would answer itself
    likelihoods = engine.likelihoods(prompts, continuations)
    assert likelihoods[0][2].is_greedy
    for prompt, rows, measured in zip(prompts, continuations, likelihoods, strict=True):
        for ids, likelihood in zip(rows, measured, strict=True):
            expected = recomputed(system, prompt, ids, GREEDY)
            assert likelihood.log_probs == pytest.approx(expected, abs=1e-3)
            [greedy] = engine.generate([prompt], replace(GREEDY, max_new_tokens=len(ids)))
            assert likelihood.is_greedy == (greedy == ids)
            assert likelihood.mean == pytest.approx(sum(expected) / len(ids), abs=1e-3)


LOG_PROB_SETTINGS = {
    name: GenerationSettings(**fields) for name, fields in read_tables(__file__).items()
}


def recomputed(system, prompt: Prompt, ids: list[int], settings: GenerationSettings) -> list:
    """Log-probabilities of an answer by one pass over it, and transformers' processors."""
    vocabulary = system.tokenizer.vocabulary
    opening = [vocabulary.boi_id] if settings.images == "forced" else []

    def scores_after(prompt_ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = system.llm(torch.tensor([[*prompt_ids, *ids]])).logits[0].float()
        return logits[len(prompt_ids) - 1 : -1, : vocabulary.size]  # [L, V]

    scores = scores_after([*prompt.ids, *opening])
    if settings.guidance != 1:
        conditional = scores.log_softmax(-1)
        unconditional = scores_after([vocabulary.boi_id]).log_softmax(-1)
        scores = settings.guidance * (conditional - unconditional) + unconditional
    processors = [RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)]
    ends = system.tokenizer.eos_token_ids
    processors.append(MinNewTokensLengthLogitsProcessor(0, settings.min_new_tokens, ends))
    if settings.constrain:
        start = ImageGrammar(vocabulary, settings.max_new_tokens, initial_ids=opening)
        processors.insert(0, ImageConstraints([start]))
    if settings.samples:
        processors += build_warpers(settings.temperature, settings.top_k, settings.top_p)
    log_probs = []
    for position, row in enumerate(scores):
        row = row[None]
        for process in processors:
            row = process(torch.tensor([ids[:position]], dtype=torch.long), row)
        log_probs.append(float(row.log_softmax(-1)[0, ids[position]]))
    return log_probs


@pytest.mark.parametrize("name", LOG_PROB_SETTINGS)
@pytest.mark.parametrize("family", ["tiny", "tiny_lavit"])
def test_log_probs_are_those_of_the_distribution_that_was_sampled(request, family, name):
    # Training by rewards weighs an answer by them: another distribution biases every step.
    system = request.getfixturevalue(family)
    settings = LOG_PROB_SETTINGS[name]
    engine = Engine(TorchBackend(system.llm), system.tokenizer)
    prompts = [Prompt(system.tokenizer.encode(text, add_bos=True)) for text in TEXTS]
    seeded = [replace(settings, seed=seed) for seed in (3, 4, 5)]
    answers = engine.sample(prompts, seeded)
    n_answers = settings.num_return_sequences
    plain = engine.generate(prompts, seeded)
    n_initial = int(settings.images == "forced")
    assert [list(answer.ids) for answer in answers] == [ids[n_initial:] for ids in plain]
    for index, answer in enumerate(answers):
        expected = recomputed(system, prompts[index // n_answers], list(answer.ids), settings)
        # Rounding depends on which requests share a pass; guidance triples it.
        assert answer.log_probs == pytest.approx(expected, abs=3e-5)


def test_likelihoods_that_cannot_be_computed(tiny):
    engine = Engine(TorchBackend(tiny.llm, max_rows=2), tiny.tokenizer)
    prompt = Prompt([1] * (engine.capacity - 2))
    with pytest.raises(GenerationError):
        engine.likelihoods([prompt], [[[5, 6, 7]]])
    with pytest.raises(ConfigError):
        engine.sample([prompt], replace(LOG_PROB_SETTINGS["sampled"], num_beams=2))
