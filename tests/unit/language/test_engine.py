"""`Engine`: answers of parallel requests equal those of transformers' `generate`, for every family."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from seed_multimodal.errors import GenerationError
from seed_multimodal.language.engine import Engine
from seed_multimodal.language.generation import (
    GenerationSettings,
    HiddenStates,
    ImageSpans,
    Prompt,
    embedded,
    generate,
)

GREEDY = GenerationSettings(max_new_tokens=30, do_sample=False)
WILD = GenerationSettings(max_new_tokens=30, temperature=3.0, top_p=0.9, top_k=0)
TEXTS = ("a", "What is this animal?", "Please draw a fish.", "no", "Where is the cat that was here?")


@pytest.fixture(params=("tiny", "tiny_x", "tiny_lavit"))
def system(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def prompts(system: Any) -> list[Prompt]:
    """Prompts as ids and, every second one, as embeddings."""
    ids = [system.tokenizer.encode_parts([text], add_bos=True) for text in TEXTS]
    embed = system.llm.get_input_embeddings()
    return [Prompt(text) if row % 2 else Prompt(embeds=embed(torch.tensor(text))) for row, text in enumerate(ids)]


def alone(system: Any, settings: GenerationSettings, seeds: list[int]) -> list[list[int]]:
    return [generate(system.llm, system.tokenizer, [prompt], settings, seeds=[seed])[0]
            for prompt, seed in zip(prompts(system), seeds, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    GREEDY, WILD, replace(WILD, force_image=True, max_new_tokens=70), replace(GREEDY, min_new_tokens=9),
    replace(WILD, repetition_penalty=1.5), replace(GREEDY, constrain=False)], ids=str)
def test_generate_equals_generate_alone(system: Any, settings: GenerationSettings) -> None:
    seeds = [5, 4, 3, 2, 1]
    expected = alone(system, settings, seeds)
    for slots in (2, 16):
        engine = Engine(system.llm, system.tokenizer, slots)
        assert engine.generate(prompts(system), settings, seeds=seeds) == expected
    requests = [engine.submit(prompt, settings, seed=seed) for prompt, seed in zip(prompts(system), seeds, strict=True)]
    assert [list(request) for request in requests] == [ids[int(settings.force_image):] for ids in expected]


def test_generate_with_guidance(tiny_lavit: Any) -> None:
    """With negative prompts of any length; equal to transformers' guidance."""
    words, texts = tiny_lavit.tokenizer, ["a red apple", "two dogs run", "a fish"]
    boi = words.vocabulary.boi_id
    negatives = [None, [*words.text_ids("a blue fish"), boi], [boi]]
    asked = [Prompt(words.text_ids(text), negative=negative) for text, negative in zip(texts, negatives, strict=True)]
    settings = replace(GREEDY, guidance=1.7, force_image=True)
    answers = Engine(tiny_lavit.llm, words, 5).generate(asked, settings, ends=[words.vocabulary.eoi_id])
    for prompt, ids in zip(asked, answers, strict=True):
        start = torch.tensor([[*prompt.ids, boi]])
        plain = tiny_lavit.llm.generate(
            start, max_new_tokens=30, do_sample=False, guidance_scale=1.7, eos_token_id=words.vocabulary.eoi_id,
            negative_prompt_ids=torch.tensor([prompt.negative or [boi]]), pad_token_id=0,
            logits_processor=[ImageSpans(words.vocabulary, opened=True, budget=30)])[0, start.shape[1]:].tolist()
        assert ids == [boi, *plain]
    assert answers[0] != Engine(tiny_lavit.llm, words).generate(asked[:1], replace(settings, guidance=1.0),
                                                                ends=[words.vocabulary.eoi_id])[0]


def test_generate_of_several_answers_has_a_seed_for_each(tiny: Any) -> None:
    engine, first = Engine(tiny.llm, tiny.tokenizer), prompts(tiny)[:1]
    several = engine.generate(first, replace(WILD, seed=4, num_return_sequences=3))
    assert several[2] == engine.generate(first, replace(WILD, seed=6))[0]


def test_generate_returns_the_states_of_a_plain_pass(tiny_x: Any) -> None:
    settings, embed = replace(GREEDY, force_image=True, max_new_tokens=80), tiny_x.llm.get_input_embeddings()
    for beams, answer in ((1, Engine(tiny_x.llm, tiny_x.tokenizer, 4).generate),
                          (2, partial(generate, tiny_x.llm, tiny_x.tokenizer))):
        states = HiddenStates()
        answers = answer(prompts(tiny_x), replace(settings, num_beams=beams), states=states)
        for row, (prompt, ids) in enumerate(zip(prompts(tiny_x), answers, strict=True)):
            with torch.inference_mode():
                passed = tiny_x.llm.model(inputs_embeds=embedded(prompt, ids, embed)[None]).last_hidden_state[0]
            places = range(1, len(ids) - 1)
            torch.testing.assert_close(states.at(row, places), passed[len(prompt) + 1:-1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_submit_from_threads_with_cancelled_requests(system: Any) -> None:
    engine, seeds = Engine(system.llm, system.tokenizer, 4), [1, 2, 3, 4, 5]
    settings = replace(WILD, force_image=True, max_new_tokens=70)
    expected, answers = alone(system, settings, seeds), dict[int, list[int]]()

    def ask(number: int) -> None:
        row = number % 5
        request = engine.submit(prompts(system)[row], settings, seed=seeds[row])
        answers[number] = list(request.answered)
        for token in request:
            answers[number].append(token)
            if number % 3 == 2 and len(answers[number]) == 4:
                break

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, ids in answers.items():
        whole = expected[number % 5]
        assert ids == (whole[:4] if number % 3 == 2 else whole), number


def test_generate_reuses_the_start_of_other_conversations(tiny: Any) -> None:
    """Also of an unfinished answer; the cached start is copied, and the next turn reads only its new tokens."""
    engine = Engine(tiny.llm, tiny.tokenizer, 4)
    words = tiny.tokenizer
    system = words.encode_parts(["Answer politely, with few words, and never about the weather."], add_bos=True)
    asked = [[*system, *words.encode_parts([text])] for text in ("What is this animal? A fish?", "no", "Why so?")]
    expected = [generate(tiny.llm, words, [Prompt(ids)], GREEDY)[0] for ids in asked]
    read: list[int] = []
    hook = tiny.llm.get_decoder().register_forward_pre_hook(
        lambda module, arguments, inputs: read.append(inputs["inputs_embeds"].shape[1]), with_kwargs=True)
    first = engine.submit(Prompt(asked[0]), GREEDY)
    begun = [next(iter(first.tokens.get, None))]
    assert engine.generate([Prompt(asked[1])], GREEDY) == [expected[1]]
    assert [*begun, *first] == expected[0]
    assert engine.generate([Prompt(asked[2])], GREEDY) == [expected[2]]
    longer = Prompt([*asked[0], *expected[0][:-1], *words.encode_parts(["And this?"])])
    answer = engine.generate([longer], GREEDY)
    hook.remove()
    assert answer == generate(tiny.llm, words, [longer], GREEDY)
    first_read, *others = [length for length in read if length > 1]
    news = [*(len(ids) - len(system) for ids in asked[1:]), len(longer) - len(asked[0]) - len(expected[0]) + 1]
    assert first_read == len(asked[0])
    assert all(length <= new for length, new in zip(others, news, strict=False)), (others, news)


def test_generate_of_long_and_short_prompts_with_common_starts(tiny: Any) -> None:
    """One to three at once: rows are freed, copied and exchanged in many orders."""
    engine, rng = Engine(tiny.llm, tiny.tokenizer, 6), random.Random(0)
    few, starts = replace(GREEDY, max_new_tokens=4), [[rng.randrange(3, 300) for _ in range(60)] for _ in range(3)]
    for count in (1, 1, 1, 1, 1, 1, 1, 2, 3, 1, 2, 3, 1, 1, 2):
        asked = [Prompt([*rng.choice(starts)[:rng.choice((0, 3, 30, 60))],
                         *(rng.randrange(3, 300) for _ in range(rng.choice((2, 40))))]) for _ in range(count)]
        assert engine.generate(asked, few) == [generate(tiny.llm, tiny.tokenizer, [one], few)[0] for one in asked]


@pytest.mark.slow
@pytest.mark.process
def test_generate_compiled_equals_eager(tiny: Any) -> None:
    """For any number of rows and positions, with at most three graphs."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, compiled = Engine(tiny.llm, tiny.tokenizer, 8), Engine(tiny.llm, tiny.tokenizer, 8, compiled=True)
    generator = torch.Generator().manual_seed(0)
    for rows, length in ((1, 5), (3, 40), (8, 150), (5, 10), (2, 300), (1, 400), (4, 5)):
        several = [Prompt(torch.randint(3, 300, (length + row,), generator=generator).tolist()) for row in range(rows)]
        assert compiled.generate(several, GREEDY) == eager.generate(several, GREEDY), (rows, length)
    assert compiled.generate(several, replace(WILD, seed=3)) == eager.generate(several, replace(WILD, seed=3))
    assert counters["stats"]["unique_graphs"] <= 3


def test_submit_of_bad_requests_ends_only_these(tiny: Any) -> None:
    engine = Engine(tiny.llm, tiny.tokenizer, 2)
    good = prompts(tiny)[1]
    with pytest.raises(GenerationError, match="context ends at"):
        engine.submit(Prompt([1] * 10_000), GREEDY)
    parallel = engine.submit(good, GREEDY)
    broken = Prompt(embeds=torch.full((3, tiny.llm.config.hidden_size), float("nan")))
    with pytest.raises(GenerationError, match="not numbers"):
        list(engine.submit(broken, GREEDY))
    with pytest.raises(IndexError):
        list(engine.submit(Prompt([10**6]), GREEDY))  # not in the vocabulary
    assert list(parallel) == generate(tiny.llm, tiny.tokenizer, [good], GREEDY)[0]
    assert list(engine.submit(good, GREEDY)) == generate(tiny.llm, tiny.tokenizer, [good], GREEDY)[0]


def test_run_between_two_tokens(tiny: Any) -> None:
    engine, beams = Engine(tiny.llm, tiny.tokenizer), replace(GREEDY, num_beams=3)
    request = engine.submit(prompts(tiny)[1], GREEDY)
    first = prompts(tiny)[:1]
    assert engine.run(lambda: generate(tiny.llm, tiny.tokenizer, first, beams)) == generate(
        tiny.llm, tiny.tokenizer, first, beams)
    assert list(request) == generate(tiny.llm, tiny.tokenizer, prompts(tiny)[1:2], GREEDY)[0]
    with pytest.raises(ZeroDivisionError):
        engine.run(lambda: 1 / 0)
