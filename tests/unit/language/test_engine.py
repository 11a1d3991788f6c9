"""`Engine`: answers next to each other are those of transformers' `generate` alone, for every family."""

from __future__ import annotations

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
    """Ids, and (every second) the same as embeddings."""
    ids = [system.tokenizer.encode_parts([text], add_bos=True) for text in TEXTS]
    embed = system.llm.get_input_embeddings()
    return [Prompt(one) if row % 2 else Prompt(embeds=embed(torch.tensor(one))) for row, one in enumerate(ids)]


def alone(system: Any, settings: GenerationSettings, seeds: list[int]) -> list[list[int]]:
    return [generate(system.llm, system.tokenizer, [one], settings, seeds=[seed])[0]
            for one, seed in zip(prompts(system), seeds, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    GREEDY, WILD, replace(WILD, force_image=True, max_new_tokens=70), replace(GREEDY, min_new_tokens=9),
    replace(WILD, repetition_penalty=1.5), replace(GREEDY, constrain=False)], ids=str)
@pytest.mark.parametrize("slots", [2, 3, 16])
def test_answers_are_those_of_generate_alone(system: Any, settings: GenerationSettings, slots: int) -> None:
    seeds = [5, 4, 3, 2, 1]
    engine = Engine(system.llm, system.tokenizer, slots)
    wanted = alone(system, settings, seeds)
    assert engine.generate(prompts(system), settings, seeds=seeds) == wanted
    again = [list(engine.submit(one, settings, seed=seed)) for one, seed in zip(prompts(system), seeds, strict=True)]
    assert again == [ids[int(settings.force_image):] for ids in wanted]


def test_guidance_takes_a_second_row(tiny_lavit: Any) -> None:
    """Negative prompts of any length; the same as transformers' guidance."""
    words, texts = tiny_lavit.tokenizer, ["a red apple", "two dogs run", "a fish"]
    boi = words.vocabulary.boi_id
    negatives = [None, [*words.text_ids("a blue fish"), boi], [boi]]
    asked = [Prompt(words.text_ids(text), negative=negative) for text, negative in zip(texts, negatives, strict=True)]
    settings = replace(GREEDY, guidance=1.7, force_image=True)
    found = Engine(tiny_lavit.llm, words, 5).generate(asked, settings, ends=[words.vocabulary.eoi_id])
    for prompt, ids in zip(asked, found, strict=True):
        given = torch.tensor([[*prompt.ids, boi]])
        plain = tiny_lavit.llm.generate(
            given, max_new_tokens=30, do_sample=False, guidance_scale=1.7, eos_token_id=words.vocabulary.eoi_id,
            negative_prompt_ids=torch.tensor([prompt.negative or [boi]]), pad_token_id=0,
            logits_processor=[ImageSpans(words.vocabulary, opened=True, budget=30)])[0, given.shape[1]:].tolist()
        assert ids == [boi, *plain]
    assert found[0] != Engine(tiny_lavit.llm, words).generate(asked[:1], replace(settings, guidance=1.0),
                                                              ends=[words.vocabulary.eoi_id])[0]


def test_several_answers_have_seeds_of_their_own(tiny: Any) -> None:
    engine, one = Engine(tiny.llm, tiny.tokenizer), prompts(tiny)[:1]
    assert engine.generate(one, replace(WILD, seed=4, num_return_sequences=3))[2] == engine.generate(
        one, replace(WILD, seed=6))[0]


def test_states_are_those_of_a_plain_pass(tiny_x: Any) -> None:
    settings, embed = replace(GREEDY, force_image=True, max_new_tokens=80), tiny_x.llm.get_input_embeddings()
    for beams, answer in ((1, Engine(tiny_x.llm, tiny_x.tokenizer, 4).generate),
                          (2, partial(generate, tiny_x.llm, tiny_x.tokenizer))):
        states = HiddenStates()
        answers = answer(prompts(tiny_x), replace(settings, num_beams=beams), states=states)
        for row, (one, ids) in enumerate(zip(prompts(tiny_x), answers, strict=True)):
            with torch.inference_mode():
                passed = tiny_x.llm.model(inputs_embeds=embedded(one, ids, embed)[None]).last_hidden_state[0]
            places = range(1, len(ids) - 1)
            torch.testing.assert_close(states.at(row, places), passed[len(one) + 1:-1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_threads_and_cancelled_neighbours(system: Any) -> None:
    engine, seeds = Engine(system.llm, system.tokenizer, 4), [1, 2, 3, 4, 5]
    settings = replace(WILD, force_image=True, max_new_tokens=70)
    wanted, got = alone(system, settings, seeds), dict[int, list[int]]()

    def ask(number: int) -> None:
        row = number % 5
        request = engine.submit(prompts(system)[row], settings, seed=seeds[row])
        got[number] = list(request.answered)
        for token in request:
            got[number].append(token)
            if number % 3 == 2 and len(got[number]) == 4:
                break

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, ids in got.items():
        whole = wanted[number % 5]
        assert ids == (whole[:4] if number % 3 == 2 else whole), number


def test_a_conversation_is_read_on_where_the_last_turn_ended(tiny: Any) -> None:
    engine = Engine(tiny.llm, tiny.tokenizer, 4)
    read: list[int] = []
    hook = tiny.llm.get_decoder().register_forward_pre_hook(
        lambda module, arguments, given: read.append(given["inputs_embeds"].shape[1]), with_kwargs=True)
    ids = tiny.tokenizer.encode_parts(["USER: What is this animal? It looks like a fish."], add_bos=True)
    first = engine.generate([Prompt(ids)], GREEDY)[0]
    assert read[0] == len(ids) and set(read[1:]) == {1}
    read.clear()
    longer = Prompt([*ids, *first[:-1], *tiny.tokenizer.encode_parts(["And this?"])])
    answer = engine.generate([longer], GREEDY)
    hook.remove()
    assert answer == generate(tiny.llm, tiny.tokenizer, [longer], GREEDY)
    assert read[0] == len(longer) - len(ids) - len(first) + 1


def test_a_beginning_is_copied_from_another_conversation(tiny: Any) -> None:
    """Also from one that is still answered; the conversation that it is copied from stays."""
    engine = Engine(tiny.llm, tiny.tokenizer, 4)
    words = tiny.tokenizer
    system = words.encode_parts(["Answer politely, with few words, and never about the weather."], add_bos=True)
    asked = [[*system, *words.encode_parts([text])] for text in ("What is this animal? A fish?", "no", "Why so?")]
    wanted = [generate(tiny.llm, words, [Prompt(ids)], GREEDY)[0] for ids in asked]
    read: list[int] = []
    hook = tiny.llm.get_decoder().register_forward_pre_hook(
        lambda module, arguments, given: read.append(given["inputs_embeds"].shape[1]), with_kwargs=True)
    first = engine.submit(Prompt(asked[0]), GREEDY)
    begun = [next(iter(first.tokens.get, None))]
    assert engine.generate([Prompt(asked[1])], GREEDY) == [wanted[1]]
    assert [*begun, *first] == wanted[0]
    assert engine.generate([Prompt(asked[2])], GREEDY) == [wanted[2]]
    longer = Prompt([*asked[0], *wanted[0][:-1], *words.encode_parts(["And this?"])])
    answer = engine.generate([longer], GREEDY)
    hook.remove()
    assert answer == generate(tiny.llm, words, [longer], GREEDY)
    first_read, *others = [length for length in read if length > 1]
    news = [*(len(ids) - len(system) for ids in asked[1:]), len(longer) - len(asked[0]) - len(wanted[0]) + 1]
    assert first_read == len(asked[0])
    assert all(length <= new for length, new in zip(others, news, strict=False)), (others, news)


@pytest.mark.slow
@pytest.mark.process
def test_compiled_answers_are_those_of_eager_passes(tiny: Any) -> None:
    """Any number of rows and positions, of few graphs."""
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


def test_bad_requests_end_alone(tiny: Any) -> None:
    engine = Engine(tiny.llm, tiny.tokenizer, 2)
    good = prompts(tiny)[1]
    with pytest.raises(GenerationError, match="context ends at"):
        engine.submit(Prompt([1] * 10_000), GREEDY)
    beside = engine.submit(good, GREEDY)
    broken = Prompt(embeds=torch.full((3, tiny.llm.config.hidden_size), float("nan")))
    with pytest.raises(GenerationError, match="not numbers"):
        list(engine.submit(broken, GREEDY))
    with pytest.raises(IndexError):
        list(engine.submit(Prompt([10**6]), GREEDY))  # no word of the vocabulary
    assert list(beside) == generate(tiny.llm, tiny.tokenizer, [good], GREEDY)[0]
    assert list(engine.submit(good, GREEDY)) == generate(tiny.llm, tiny.tokenizer, [good], GREEDY)[0]


def test_run_uses_the_model_between_two_tokens(tiny: Any) -> None:
    engine, beams = Engine(tiny.llm, tiny.tokenizer), replace(GREEDY, num_beams=3)
    request = engine.submit(prompts(tiny)[1], GREEDY)
    one = prompts(tiny)[:1]
    assert engine.run(lambda: generate(tiny.llm, tiny.tokenizer, one, beams)) == generate(
        tiny.llm, tiny.tokenizer, one, beams)
    assert list(request) == generate(tiny.llm, tiny.tokenizer, prompts(tiny)[1:2], GREEDY)[0]
    with pytest.raises(ZeroDivisionError):
        engine.run(lambda: 1 / 0)
