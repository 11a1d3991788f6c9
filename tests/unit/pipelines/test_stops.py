"""Answers end at stop sequences: no token is generated behind them, in every family, engine and
form of request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from random_images import noise
from reference_generation import generate

from seed_multimodal.inference.prompt import GenerationSettings, Prompt
from seed_multimodal.language.messages import user_message
from seed_multimodal.pipelines.base import MultimodalSystem

FAMILIES = ("tiny", "tiny_x", "tiny_lavit")
LONG = {"max_new_tokens": 40, "do_sample": False, "num_beams": 1}
pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised")


@pytest.fixture(params=FAMILIES)
def system(request) -> Any:
    return request.getfixturevalue(request.param)


def prompts(system: Any, count: int = 3) -> list[Prompt]:
    texts = ("What is this animal?", "Please draw a fish.", "a red apple and a blue house")
    return [Prompt(system.tokenizer.encode_parts([text], add_bos=True)) for text in texts[:count]]


def middle(text: str) -> str:
    """Four letters of a text that do not stand before."""
    return next(
        text[start : start + 4]
        for start in range(len(text) // 3, len(text) - 4)
        if text.find(text[start : start + 4]) == start
        and text[start : start + 4].strip() == text[start : start + 4]
    )


def plain_text(system: Any, ids: list[int]) -> str:
    """The text of an answer without images."""
    vocabulary = system.tokenizer.vocabulary
    return str(
        system.tokenizer.decode([id for id in ids if not vocabulary.is_image_token(id)], True)
    )


def test_generate_of_a_batch_ends_each_answer_at_its_stop(system):
    """The ids go up to the stop, which only the first of three answers holds."""
    settings = GenerationSettings(**LONG, constrain=True)
    unstopped = [system.generate([prompt], settings)[0] for prompt in prompts(system)]
    stop = middle(plain_text(system, unstopped[0]))
    ended = system.generate(prompts(system), replace(settings, stop=(stop,)))
    for ids, expected in zip(ended, unstopped, strict=True):
        assert ids == expected[: len(ids)]
        assert (len(ids) < len(expected)) == (stop in plain_text(system, expected))
        assert not stop or stop not in plain_text(system, ids[:-1])
    answer = system.read_answer(ended[0], replace(settings, stop=(stop,)))
    assert stop not in answer.text and answer == system.read_answer(
        unstopped[0], replace(settings, stop=(stop,))
    )


def test_generate_with_a_stop_behind_the_verdict(system):
    settings = GenerationSettings(**LONG)
    unstopped = system.generate(prompts(system, 1), settings)[0]
    text = plain_text(system, unstopped)
    stop = middle(text)
    late = replace(settings, stop=(stop,), stop_after=text[text.find(stop) :][:5])
    assert system.generate(prompts(system, 1), late)[0] == unstopped


def test_generate_with_beams_ends_at_a_stop(tiny):
    settings = GenerationSettings(max_new_tokens=30, do_sample=False, num_beams=3)
    unstopped = generate(tiny.llm, tiny.tokenizer, prompts(tiny), settings)
    stop = middle(plain_text(tiny, unstopped[0]))
    for ids in generate(tiny.llm, tiny.tokenizer, prompts(tiny), replace(settings, stop=(stop,))):
        assert stop not in plain_text(tiny, ids[:-1])


def test_chat_ends_at_a_stop_whole_and_streamed(tiny):
    conversation = [{"role": "user", "content": [noise(0), "What?"]}]
    unstopped = tiny.chat(conversation, **LONG)
    stop = middle(unstopped.text)
    ended = tiny.chat(conversation, **LONG, stop=[stop])
    assert (
        unstopped.text.startswith(ended.text)
        and stop not in ended.text
        and len(ended.ids) < len(unstopped.ids)
    )
    events = list(tiny.chat(conversation, stream=True, **LONG, stop=[stop]))
    assert (
        "".join(event["text"] for event in events if event["type"] == "text").strip()
        == ended.text.strip()
    )


def test_an_image_before_a_stop_stays(tiny):
    """The same text behind an image, and the image itself, for a forced drawing with text
    behind it."""
    settings = replace(GenerationSettings(max_new_tokens=60, do_sample=False), force_image=True)
    unstopped = tiny.generate(prompts(tiny, 1), settings)[0]
    behind = plain_text(tiny, unstopped)
    ended = tiny.generate(prompts(tiny, 1), replace(settings, stop=(middle(behind),)))[0]
    assert len(ended) < len(unstopped)
    answer = tiny.read_answer(ended, replace(settings, stop=(middle(behind),)))
    assert (
        len(answer.codes) == 1 and answer.codes == tiny.read_answer(unstopped, settings).codes[:1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nano", "nano-x", "nano-lavit"])
def test_ask_and_chat_generate_nothing_behind_the_answer(model):
    """Behind the answer there may be a token for its end, or those of the next turn's opening."""
    system = MultimodalSystem.from_pretrained(model, device="cpu", log=None, load_decoder=False)
    opening = sum(len(system.tokenizer.encode(stop)) for stop in system.stop_sequences("chat"))
    questions = [
        "Where is the dog?",
        "Is there a star?",
        "How many are there?",
        "What is on the left?",
    ]
    conversations = [
        user_message([noise(seed), system.tasks.question(text)])
        for seed, text in enumerate(questions)
    ]
    settings = system.settings("ask")
    answers = system.generate_answers(conversations, "ask", settings)
    ids = system.generate(system.build_prompts(conversations, "ask"), settings, "ask")
    for answer, generated in zip(answers, ids, strict=True):
        assert len(generated) <= len(answer.answer.ids) + max(opening, 1) + 1, (
            system.tokenizer.decode(generated)
        )
