"""What every family does: tasks, batches, seeds, threads, streams, stops, settings, saving.

A new family is tested by its entry in `FAMILIES`, with a fixture of a tiny system (conftest.py).
"""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from random_images import noise, same
from systems import load
from yaml_tables import read_tables

import seed_multimodal
from seed_multimodal.errors import (
    CheckpointError,
    ConfigError,
    GenerationError,
    RequestError,
)
from seed_multimodal.language.messages import read_messages, user_message
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.tasks import Task

SAMPLING = {"temperature": 2.0, "top_p": 1.0, "top_k": 0}
STEPS = {"num_inference_steps": 2}
GREEDY = {"max_new_tokens": 40, "do_sample": False, "num_beams": 1}
NANO = ("nano", "nano-x", "nano-lavit")
pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised")


@dataclass(frozen=True)
class Family:
    """A family's tiny system, and what it can do."""

    fixture: str
    drawing: dict = field(default_factory=lambda: dict(STEPS))  # its shortest settings
    has_noise: bool = True  # in its drawings
    has_codes: bool = True
    has_conversations: bool = True
    refused: dict[str, Callable[[Any], object]] = field(default_factory=dict)


def detect(system):
    return system.detect(noise(1), "a fish")


FAMILIES = {
    "seed_llama": Family("tiny", refused={"detection": detect}),
    "seed_x": Family(
        "tiny_x", has_codes=False, refused={"codes": lambda system: system.tokenize(noise(1))}
    ),
    "lavit": Family(
        "tiny_lavit",
        has_conversations=False,
        refused={
            "detection": detect,
            "plain prompts": lambda system: system.use_plain_prompts(),
        },
    ),
    # Of another package, by its entry point alone.
    "mosaic": Family("mosaic", drawing={}, has_noise=False, refused={"detection": detect}),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def system(family, request):
    return request.getfixturevalue(family.fixture)


def user(*content) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


def texts_of(events: list[dict]) -> list[str]:
    """The streamed texts before, between and behind the images."""
    texts = [""]
    for event in events:
        if event["type"] == "text":
            texts[-1] += event["text"]
        elif event["type"] == "image":
            texts.append("")
    return [text.strip() for text in texts]


def test_every_family_has_a_row(installed):
    from seed_multimodal.models.registry import families

    names = [spec.name for spec in families()]
    names.remove("seed_glm_image")  # it writes no text: see tests/unit/glm_image
    assert names == [*FAMILIES]  # others' behind ours


# ---- batches


def test_texts_of_a_list_equal_those_alone(system):
    # Answers must not depend on who else is served: batches pad images and prompts.
    images = [noise(1), noise(2, (300, 20)), noise(3, (1, 1)), noise(4), noise(5)]
    assert system.describe(images, batch_size=3) == [system.describe(image) for image in images]
    questions = ["What is it?", "Is it a cat?", "Where?", "How many?", "Why?"]
    answers = system.ask(images, questions, batch_size=2)
    assert answers == [
        system.ask(image, text) for image, text in zip(images, questions, strict=True)
    ]
    assert isinstance(system.describe(images[0]), str)
    assert system.describe([]) == []

    # A list in the list is one prompt of several images.
    both = system.describe([images[:2], images[0]], seed=1, **SAMPLING)
    assert both[0] == system.describe([images[:2]], seed=1, **SAMPLING)[0]
    assert both[1] == system.describe(images[0], seed=1, **SAMPLING)


def test_images_of_a_list_equal_those_alone(system, family):
    # Image n of a request is the image of its own text and seed, whatever is drawn with it.
    options = {**family.drawing, **SAMPLING}
    texts = ["a red apple", "a blue fish"]
    for image, text in zip(system.draw(texts, seed=3, **options), texts, strict=True):
        assert same(image, system.draw(text, 3, **options))
    four = system.draw("a fish", seed=5, num_images=4, **options)
    assert len(four) == 4
    assert same(four[2], system.draw("a fish", 7, **options))
    assert not same(four[0], four[1])

    sources = [noise(1), noise(2)]
    edited = system.edit(sources, "Make it red.", seed=2, **family.drawing)
    rebuilt = system.reconstruct(sources, 3, **family.drawing)
    for source, image, again in zip(sources, edited, rebuilt, strict=True):
        assert same(image, system.edit(source, "Make it red.", 2, **family.drawing))
        assert same(again, system.reconstruct(source, 3, **family.drawing)[0])
    other_seed = system.reconstruct(sources[0], 4, **family.drawing)[0]
    assert same(rebuilt[0], other_seed) != family.has_noise
    if family.has_codes:
        for source, codes in zip(sources, system.tokenize(sources), strict=True):
            assert torch.equal(codes, system.tokenize(source)[0])
            small = system.images.preprocess(source)  # as threads of `seed tokenize` do
            assert torch.equal(codes, system.tokenize(small)[0])


def test_draw_of_several_images_varies_greedy_codes(mosaic):
    # Its images are its codes without noise: equal codes would be one image n times.
    plain = mosaic.draw("a blue fish")
    varied = mosaic.draw("a blue fish", num_images=12)
    assert same(varied[0], plain)
    assert not all(same(image, plain) for image in varied)
    greedy = mosaic.draw("a blue fish", num_images=3, do_sample=False, temperature=1.0)
    assert all(same(image, plain) for image in greedy)


# ---- seeds and threads


def test_results_depend_only_on_the_seed(system, family):
    # A seed repeats an answer, and the caller's own random numbers stay as they are.
    options = {"max_new_tokens": 12, **SAMPLING}
    answers = [system.describe(noise(1), seed=seed, **options) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    state = torch.get_rng_state()
    system.draw("a fish", 1, **family.drawing, **SAMPLING)
    assert torch.equal(torch.get_rng_state(), state)


def test_results_in_threads_equal_those_alone(system, family):
    # Texts are equal; images within one grey level: features of a batch differ in their last
    # digits.
    options = {**family.drawing, **SAMPLING}
    jobs: list[Callable[[], Any]] = []
    for seed in range(2):
        jobs.append(lambda seed=seed: system.describe(noise(seed), seed=seed, **SAMPLING))
        jobs.append(lambda seed=seed: system.draw("a fish", seed, **options))
        jobs.append(lambda seed=seed: system.reconstruct(noise(seed), seed, **family.drawing)[0])
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job) for job in jobs]
    for future, job in zip(futures, jobs, strict=True):
        answer, expected = future.result(), job()
        assert answer == expected if isinstance(answer, str) else same(answer, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "request_", "options", "functions", "files"),
    [
        ("describe", noise(1), {}, 162, 31),  # with its distance from known images
        ("draw", "a fox", {"read_back": False}, 156, 31),
        ("draw", "a fox", {}, 176, 33),  # and describes it
    ],
)
def test_a_request_crosses_few_functions(task, request_, options, functions, files):
    # What must be read to follow one request, in all threads, once everything is loaded: what each
    # of two systems enters, since some functions depend on when threads run and objects are freed.
    library = str(Path(seed_multimodal.__file__).parent)
    first, *systems = [load("nano") for _ in range(3)]
    entered: list[set[tuple[str, str]]] = []

    def profile(frame, event: str, _):
        code = frame.f_code
        is_ours = code.co_filename.startswith(library) and not code.co_name.startswith("<")
        if event == "call" and is_ours:
            entered[-1].add((code.co_filename, code.co_qualname))

    getattr(first, task)(request_, **options)
    for system in systems:
        system.images.prepare_drawing()
        entered.append(set())
        threading.setprofile(profile)
        sys.setprofile(profile)
        try:
            getattr(system, task)(request_, **options)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    common = set.intersection(*entered)
    assert len(common) <= functions
    assert len({file for file, _ in common}) <= files


# ---- conversations and streams


@pytest.mark.parametrize(
    "options",
    [{}, {"force_image": True}, {"seed": 5, **SAMPLING}, {"num_beams": 2}, {"max_new_tokens": 3}],
    ids=["greedy", "image", "sampled", "beams", "cut"],
)
def test_answers_streamed_and_of_lists_equal_chat(system, options):
    # A page that streams shows what the command line prints.
    options = {"seed": 1, "num_beams": 1, **options}
    message = user(noise(0), "What?")
    plain = system.chat(message, **options)
    events = list(system.chat(message, stream=True, previews=(), **options))
    streamed = events[-1]["answer"]
    assert [event["type"] for event in events].count("done") == 1
    assert [event["codes"] for event in events if event["type"] == "image"] == plain.codes
    assert len(plain.images) == len(streamed.images) >= bool(options.get("force_image"))
    assert all(map(same, streamed.images, plain.images))
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in plain.parts
    ]
    assert texts_of(events) == texts_of(parts)

    answers = [streamed]
    if "force_image" not in options:
        turns = read_messages(message, images_first=system.config.tuned)
        task, turns = system.family.read_chat(turns, draws=False)
        [[generated]] = system.generate([Task(task, turns, system.settings(task, **options))])
        answers.append(generated.answer)
    for answer in answers:
        assert answer == plain
        assert answer.finish_reason == plain.finish_reason
        assert answer.prompt_tokens == plain.prompt_tokens
    assert plain.finish_reason == "length" or "max_new_tokens" not in options


def middle(text) -> str:
    """Four letters of a text that do not stand before."""
    starts = range(len(text) // 3, len(text) - 4)
    candidates = (text[start : start + 4] for start in starts if text[start : start + 4].strip())
    return next(part for part in candidates if part == part.strip() and text.count(part) == 1)


def test_answers_end_at_a_stop(system):
    # No token is generated behind it, whole and streamed, alone and in a batch.
    message = user(noise(0), "What?")
    unstopped = system.chat(message, **GREEDY)
    stop = middle(unstopped.text)
    options = {**GREEDY, "stop": [stop]}
    ended = system.chat(message, **options)
    assert stop not in ended.text
    assert unstopped.text.startswith(ended.text)
    assert list(ended.ids) == list(unstopped.ids)[: len(ended.ids)]
    assert len(ended.ids) < len(unstopped.ids)
    events = list(system.chat(message, stream=True, **options))
    assert texts_of(events) == [ended.text.strip()]
    assert stop not in system.chat(message, **{**options, "num_beams": 3}).text

    # The text before a forced image is the system's.
    opening = list(system.tasks.draw_response or "a")
    assert system.chat(message, **GREEDY, force_image=True, stop=opening).images

    images = [noise(seed) for seed in range(3)]
    texts = system.describe(images, **GREEDY)
    stop = middle(texts[0])
    for text, expected in zip(system.describe(images, **GREEDY, stop=[stop]), texts, strict=True):
        assert text.strip() == expected.partition(stop)[0].strip()


def test_chat_that_is_cancelled(system):
    # A client that leaves must not keep the model busy.
    events = system.chat(user(noise(1), "What?"), stream=True, force_image=True)
    next(events)
    events.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("seed-generate") for name in names)

    calls: list[int] = []

    def should_stop() -> bool:
        calls.append(1)
        return len(calls) > 3

    answer = system.chat(user(noise(1), "What?"), force_image=True, should_stop=should_stop)
    assert not answer.images
    assert 3 <= len(calls) <= 5


@pytest.mark.parametrize(
    "content",
    [["What?", noise(1)], ["What?", noise(1), " "], [noise(1), "What?", noise(2)]],
    ids=["text first", "blank last", "text between"],
)
def test_chat_reads_images_before_the_question(system, content):
    # OpenAI's guide writes the text first; behind an image the models would draw another one.
    images = [part for part in content if not isinstance(part, str)]
    ordered = system.chat(user(*images, "What?"), **GREEDY)
    assert system.chat(user(*content), **GREEDY).ids == ordered.ids


@pytest.mark.parametrize(
    "content", [[noise(1)], [noise(1), " "], ["", noise(1), noise(2)]], ids=len
)
def test_images_alone_are_described(system, content):
    # Whoever sends only a picture would get another one, or words that stand behind none.
    request = user(*[part for part in content if not isinstance(part, str)], system.tasks.describe)
    described = system.chat(request, **GREEDY)
    assert system.chat(user(*content), **GREEDY).ids == described.ids
    if system.abilities.converses:
        earlier = [*user("Hello"), {"role": "assistant", "content": "Hello."}]
        described = system.chat([*earlier, *request], **GREEDY)
        assert system.chat([*earlier, *user(*content)], **GREEDY).ids == described.ids


def test_chat_of_several_turns(system, family):
    # A conversation goes on after a drawing; too long a one loses its oldest turns.
    first = user(noise(1), "Make it red.")
    answer = system.chat(first, force_image=True)
    assert answer.images
    turns = [*first, {"role": "assistant", "content": answer}, *user("And now?")]
    if not family.has_conversations:
        with pytest.raises(RequestError):
            system.chat(turns)
        return
    assert system.chat(turns, force_image=True).images
    # SEED-X reads its drawing with the next question, as it learned; clients send the pixels.
    if not system.abilities.reads_codes:
        pixels = {"role": "assistant", "content": answer.images}
        for conversation in (turns, [*first, pixels, *turns[2:]]):
            _, read = system.family.read_chat(read_messages(conversation), draws=False)
            [prompt] = system.family.prompts([read], "chat")
            assert len(prompt.images) == 2
    system_role = [{"role": "system", "content": "Answer in verse."}, *turns]
    assert system.chat(system_role, seed=1).ids

    # The oldest turns of a conversation that is too long are left out; a single one is refused.
    pair = (*user("Tell me about the tall tree."), {"role": "assistant", "content": "It is tall."})
    answer = system.chat([*pair * 40, *user("And now?")])
    assert "left out" in answer.note
    with pytest.raises(RequestError, match="characters"):
        system.chat(user("a tree " * 2000))
    with pytest.raises(GenerationError, match="tokens"):
        system.chat(user("a " * (system.family.max_characters // 2 - 10)))


@pytest.mark.slow
@pytest.mark.parametrize("model", NANO[:2])
def test_chat_reads_only_new_tokens(model):
    # Each image is encoded once; keys and values of read tokens, also of a shared system
    # message, are cached.
    system = load(model)
    encoded: list[int] = []
    read: list[int] = []
    modules = system.images.model.modules()
    patches = next(module for module in modules if isinstance(module, torch.nn.Conv2d))
    patches.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    system.llm.get_decoder().register_forward_pre_hook(
        lambda module, arguments, inputs: read.append(inputs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    rule = "Answer politely, with few words, and never about politics or the weather."
    opening = [{"role": "system", "content": rule}]
    conversation = [*opening, *user(noise(1), "What is this?")]
    first = system.chat(conversation)
    other = system.chat([*opening, *user("What is a dog?")], read_back=False)
    rule_length = len(system.tokenizer.encode_parts([rule]))
    assert max(read[len(first.ids) :]) <= other.prompt_tokens - rule_length
    read.clear()
    turns = [*conversation, {"role": "assistant", "content": first}, *user(noise(2), "And this?")]
    second = system.chat(turns)
    assert len(encoded) == 2
    assert max(read) <= second.prompt_tokens - first.prompt_tokens - len(first.ids) + 2


@pytest.mark.slow
@pytest.mark.parametrize("model", NANO)
def test_ask_generates_nothing_behind_the_answer(model):
    # Behind it there may be a token for its end, or those of the next turn's opening: a model
    # that goes on would double the time of every answer.
    system = load(model, load_decoder=False)
    opening = sum(len(system.tokenizer.encode(stop)) for stop in system.settings().stop)
    questions = ("Where is the dog?", "Is there a star?", "How many are there?")
    conversations = [
        user_message([noise(seed), system.family.tasks.question(question)])
        for seed, question in enumerate(questions)
    ]
    settings = system.settings("ask")
    tasks = [Task("ask", conversation, settings) for conversation in conversations]
    [answers] = system.generate(tasks)
    ids = system.engine.generate(system.family.prompts(conversations, "ask"), settings)
    for answer, generated in zip(answers, ids, strict=True):
        assert len(generated) <= len(answer.answer.ids) + max(opening, 1) + 1


@pytest.mark.parametrize("model", NANO)
def test_drawings_are_read_back(model):
    # What a user did not ask for must not be delivered as if it were right.
    logged: list[str] = []
    system = MultimodalSystem.from_pretrained(model, device="cpu", log=logged.append)
    logged.clear()
    texts = ["two cats at night", "a dog on the moon"]  # a dog, or a moon
    images = system.draw(texts)
    right, wrong = images
    assert "two" in right.info["description"].lower() and "cats" in right.info["description"]
    assert right.info["note"] == ""
    assert "Image 1" in wrong.info["note"] and "no " in wrong.info["note"]
    if system.abilities.detects:  # what is absent is the answer, no note
        assert not system.detect(right, "the dog").boxes
    assert logged == [wrong.info["note"]]

    # Without it, pixels are the same; so are those of chats, whose answers have the note.
    without = system.draw(texts, read_back=False)
    assert all("description" not in image.info for image in without)
    assert same(images[0], without[0]) and same(images[1], without[1])
    answer = system.chat(user(f"Please draw {texts[1]}."), force_image=True, seed=0)
    (drawing,) = (part for part in answer.parts if not isinstance(part, str))
    assert drawing.description and "no " in answer.note
    edited = system.edit(images[0], "Put it in a meadow.")
    assert edited.info["description"]


@pytest.mark.parametrize("steps", [None, 1])
def test_chat_previews_have_their_own_denoising_steps(tiny, monkeypatch, steps):
    # The previews of tiny's 8 and 16 codes, then the whole image; its folder draws in 2 steps.
    monkeypatch.setattr(tiny.config, "preview_inference_steps", steps)
    passes: list[int] = []
    hook = tiny.images.decoder.unet.register_forward_pre_hook(
        lambda module, inputs: passes.append(1)
    )
    counts: list[int] = []
    for event in tiny.chat(user(noise(1), "What?"), stream=True, force_image=True):
        if "image" in event:
            counts.append(len(passes))
            passes.clear()
    hook.remove()
    assert counts[:3] == [steps or 2, steps or 2, 2]


# ---- settings


def test_what_a_family_cannot_do_is_refused_by_name(system, family):
    # Not an AttributeError in a server's log.
    for ability, call in family.refused.items():
        with pytest.raises(ConfigError, match=system.config.name):
            call(system)
        assert ability


@pytest.mark.parametrize("row", read_tables(__file__), ids=str)
def test_wrong_options_are_refused_by_name(system, row):
    # A misspelt option must not be ignored: the answer would look as if it had been followed.
    request = {"draw": "a fish", "chat": user(noise(1))}.get(row["task"], noise(1))
    with pytest.raises(ConfigError, match=row["named"]):
        getattr(system, row["task"])(request, **row["options"])


def test_empty_requests_are_refused_by_number(system, family):
    # Results stand where their requests stood: nothing is dropped, and no list gives no results.
    image = noise(1)
    for texts in (["a fish", ""], ["a fish", " ."]):
        with pytest.raises(RequestError, match="1"):
            system.draw(texts)
        with pytest.raises(RequestError, match="1"):
            system.edit([image, image], texts)
        with pytest.raises(RequestError, match="1"):
            system.ask([image, image], texts)
        if system.abilities.detects:
            with pytest.raises(RequestError, match="1"):
                system.detect([image, image], texts)
    with pytest.raises(RequestError, match="1"):
        system.reconstruct([image, []])
    for answers in ([["a"], [""]], [["a"]]):
        with pytest.raises(RequestError, match="1"):
            system.likelihoods([image, image], "What?", answers)
    with pytest.raises(ConfigError, match="num_images"):
        system.draw("a fish", num_images=0)
    assert len(system.draw(iter(["a cat"]))) == 1  # no text is lost to a check
    assert system.draw([]) == system.edit([], "Make it red.") == system.reconstruct([]) == []


def test_answers_without_images_have_none(tiny):
    options = {"temperature": 5.0, "top_p": 1.0, "top_k": 0, "seed": 2, "max_new_tokens": 100}
    assert tiny.chat(user("Tell me about the cat."), **options).codes
    assert not tiny.chat(user("Tell me about the cat."), images="never", **options).codes


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0, "top_p": 1.0}, {"temperature": 3.0, "top_p": 0.0}]
)
def test_zero_temperature_or_top_p_is_greedy(system, options):
    # As OpenAI's clients ask for greedy answers; a division by zero otherwise.
    greedy = system.describe(noise(1), do_sample=False, num_beams=1)
    assert system.describe(noise(1), seed=0, **options) == greedy


# ---- loading and saving


def test_from_pretrained_without_decoder(system, family):
    # Servers that only read save the de-tokenizer's memory.
    reader = load(system.config, load_decoder=False)
    assert type(reader) is type(system)
    assert reader.describe(noise(1)) == system.describe(noise(1))
    if family.has_noise:
        with pytest.raises(CheckpointError):
            reader.draw("a fish")


@pytest.mark.slow
def test_from_pretrained_with_offload(system, family):
    # Parts on the device only while they work give the same results.
    offloaded = load(system.config, offload=True)
    assert offloaded.describe(noise(1)) == system.describe(noise(1))
    drawn = offloaded.draw("a fish", 1, **family.drawing)
    assert same(drawn, system.draw("a fish", 1, **family.drawing))
    with pytest.raises(ConfigError, match="--compile"):
        load(system.config, compiled=True, offload=("llm",))


@pytest.mark.nightly
@pytest.mark.process
def test_from_pretrained_compiled_image_networks(tiny):
    system = load(tiny.config)
    system.images.compile()
    assert system.tokenize(noise(1)).tolist() == tiny.tokenize(noise(1)).tolist()
    assert same(system.draw("a fish", 1, **STEPS), tiny.draw("a fish", 1, **STEPS))


def test_save_pretrained_and_load(system, family, tmp_path):
    # The saved folder is the whole system, also for transformers.
    from transformers import AutoModelForCausalLM

    folder = system.save_pretrained(tmp_path / "mine")
    saved = load(folder)
    assert saved.describe(noise(1)) == system.describe(noise(1))
    assert "any-to-any" in (folder / "README.md").read_text()
    drawn = saved.draw("a fish", 1, **family.drawing)
    assert same(drawn, system.draw("a fish", 1, **family.drawing))
    assert type(AutoModelForCausalLM.from_pretrained(saved.config.llm)) is type(system.llm)
