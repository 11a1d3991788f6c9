"""`MultimodalSystem`: tasks, batches, seeds, threads, conversations and settings, on tiny
systems of each family."""

from __future__ import annotations

import base64
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_images import noise
from tiny_lavit import same
from transformers import AutoModelForCausalLM

from seed_multimodal.errors import (
    CheckpointError,
    ConfigError,
    GenerationError,
    ImageError,
    RequestError,
)
from seed_multimodal.language.answer import Answer
from seed_multimodal.language.messages import user_message
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.images import VARIATION

FAMILIES = ("tiny", "tiny_x", "tiny_lavit")
SAMPLING = {"temperature": 2.0, "top_p": 1.0, "top_k": 0}
FEW = {"num_inference_steps": 2}
pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised")


@pytest.fixture(params=FAMILIES)
def system(request) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=FAMILIES[:2])
def talking(request) -> Any:
    """Systems with conversations."""
    return request.getfixturevalue(request.param)


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


# ---- batches


def test_describe_and_ask_of_a_list(system):
    images = [noise(1), noise(2, (300, 20)), noise(3, (1, 1)), noise(4), noise(5)]
    assert system.describe(images, batch_size=3) == [system.describe(image) for image in images]
    questions = ["What is it?", "Is it a cat?", "Where?", "How many?", "Why?"]
    answers = system.ask(images, questions, batch_size=2)
    assert answers == [
        system.ask(image, text) for image, text in zip(images, questions, strict=True)
    ]
    assert isinstance(system.describe(images[0]), str) and system.describe([]) == []


def test_draw_of_a_list(system):
    texts = ["a red apple", "a blue fish"]
    both = system.draw(texts, seed=3, **FEW, **SAMPLING)
    assert all(
        same(image, system.draw(text, 3, **FEW, **SAMPLING))
        for image, text in zip(both, texts, strict=True)
    )
    four = system.draw("a fish", seed=5, num_images=4, **FEW, **SAMPLING)
    assert len(four) == 4 and same(four[2], system.draw("a fish", 7, **FEW, **SAMPLING))
    assert not same(four[0], four[1])


def test_draw_of_a_list_with_an_empty_text(system):
    with pytest.raises(RequestError, match="Message 1 is empty"):
        system.draw(["a fish", ""], verbatim=True)


def test_draw_of_several_images_samples_all_but_the_first(system, monkeypatch):
    """Of greedy settings; SEED-X's features have nothing to sample, so its images differ by the
    noise alone."""
    greedy = {"do_sample": False}
    for name in ("temperature", "top_p"):  # the random model is sure of its tokens
        monkeypatch.setitem(VARIATION, name, SAMPLING[name])
    if type(system).__name__ == "Lavit":  # the original's settings sample every image
        system = copy.copy(system)
        system.config = replace(system.config, generation={"draw": greedy})
    conversations = [user_message([text]) for text in ("a blue fish", "a red apple")]

    def answers(**options: Any) -> list[tuple[int, ...]]:
        """The ids of five answers to each request."""
        answers = system._generate_several(conversations, "draw", 5, range(10), options)
        return [tuple(generated.answer.ids) for generated in answers]

    varied = answers()
    equal_codes = answers(**greedy)
    assert (
        len(set(equal_codes[:5])) == 1 and varied[::5] == equal_codes[::5] and varied == answers()
    )
    assert (len(set(varied[:5])) > 1) == system.images.has_codes


def test_edit_and_reconstruct_of_a_list(system):
    images = [noise(1), noise(2)]
    edited = system.edit(images, "Make it red.", seed=2, **FEW)
    assert all(
        same(result, system.edit(image, "Make it red.", 2, **FEW))
        for result, image in zip(edited, images, strict=True)
    )
    again = system.reconstruct(images, 3, **FEW)
    assert len(again) == 2 and same(again[1], system.reconstruct(images[1], 3, **FEW)[0])
    assert not same(again[0], system.reconstruct(images[0], 4, **FEW)[0])


def test_describe_of_nested_lists(system):
    first = noise(1)
    second = noise(2)
    both = system.describe([[first, second], first], **SAMPLING, seed=1)
    assert both[0] == system.describe([[first, second]], **SAMPLING, seed=1)[0]
    assert both[1] == system.describe(first, **SAMPLING, seed=1)


def test_describe_of_files_bytes_and_arrays(system, tmp_path):
    image = noise(1)
    image.save(tmp_path / "a.png")
    file = tmp_path / "a.png"
    assert (
        len(set(system.describe([image, file, str(file), file.read_bytes(), np.asarray(image)])))
        == 1
    )


# ---- seeds and threads


def test_describe_depends_only_on_the_seed(system):
    answers = [
        system.describe(noise(1), seed=seed, max_new_tokens=12, **SAMPLING) for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
    state = torch.get_rng_state()
    system.draw("a fish", 1, **FEW, **SAMPLING)
    assert torch.equal(torch.get_rng_state(), state)


def test_describe_draw_and_reconstruct_in_threads(system):
    """Texts are equal; images within one grey level: features of a batch differ in their last
    digits."""
    jobs = [
        job
        for seed in range(2)
        for job in (
            lambda seed=seed: system.describe(noise(seed), seed=seed, **SAMPLING),
            lambda seed=seed: system.draw("a fish", seed, **FEW, **SAMPLING),
            lambda seed=seed: system.reconstruct(noise(seed), seed, **FEW)[0],
        )
    ]
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(job) for job in jobs]
    for future, job in zip(futures, jobs, strict=True):
        answer = future.result()
        expected = job()
        assert answer == expected if isinstance(answer, str) else same(answer, expected)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nano", "nano-x", "nano-lavit"])
def test_draw_of_several_threads_in_common_batches(model):
    """Equal to drawing one by one, with fewer calls of the U-Net; a failing call does not
    affect the others."""
    system = MultimodalSystem.from_pretrained(model, device="cpu", log=None)
    images = system.images
    count = 8
    values = list(images.encode([noise(seed) for seed in range(count)]))
    alone = [images.draw([value], seeds=[seed])[0] for seed, value in enumerate(values)]
    loops: list[int] = []
    images.decoder.unet.register_forward_pre_hook(lambda module, args: loops.append(len(args[0])))
    images.draw(values[:1], seeds=[0])
    steps = len(loops)
    barrier = threading.Barrier(count + 1)

    def draw(seed: Any, value: Any) -> Image.Image:
        barrier.wait()
        return images.draw([value], seeds=[seed])[0]

    with ThreadPoolExecutor(count + 1) as pool:
        broken = pool.submit(draw, "no seed", values[0])
        together = [*pool.map(draw, range(count), values)]
    assert isinstance(broken.exception(), RuntimeError)
    assert all(same(image, other) for image, other in zip(together, alone, strict=True))
    loops.clear()
    barrier = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        assert all(
            same(image, other)
            for image, other in zip(pool.map(draw, range(count), values), alone, strict=True)
        )
        codes = [*pool.map(images.encode, [[noise(seed)] for seed in range(count)])]
    assert len(loops) <= steps * count // 2 and max(loops) > 1
    if model != "nano-x":
        assert all(torch.equal(row[0], value) for row, value in zip(codes, values, strict=True))


# ---- conversations


@pytest.mark.parametrize(
    "options", [{}, {"force_image": True}, {"seed": 5, **SAMPLING}, {"num_beams": 2}]
)
def test_chat_streamed_equals_chat(system, options):
    options = {"seed": 1, "num_beams": 1, **options}
    plain = system.chat(user(noise(0), "What?"), **options)
    events = list(system.chat(user(noise(0), "What?"), stream=True, previews=(), **options))
    streamed = events[-1]["answer"]
    assert [event["type"] for event in events].count("done") == 1 and list(streamed.ids) == list(
        plain.ids
    )
    assert [event["codes"] for event in events if event["type"] == "image"] == plain.codes
    assert all(
        same(image, other) for image, other in zip(streamed.images, plain.images, strict=True)
    )
    assert len(plain.images) >= bool(options.get("force_image"))
    text = "".join(event["text"] for event in events if event["type"] == "text")
    assert text.split() == " ".join(part for part in plain.parts if isinstance(part, str)).split()


def test_chat_after_an_answer(talking):
    first = user(noise(1), "Make it red.")
    answer = talking.chat(first, force_image=True)
    turns = [*first, {"role": "assistant", "content": answer}, *user("And now?")]
    assert isinstance(talking.chat(turns), Answer) and talking.chat(turns, force_image=True).images
    system_role = [{"role": "system", "content": "Answer in verse."}, *turns]
    assert talking.chat(system_role, seed=1).ids


@pytest.mark.parametrize("model", ["nano", "nano-x"])
def test_chat_reads_only_new_tokens(model):
    """Each image is encoded once; keys and values of read tokens, also of a shared system
    message, are cached."""
    system = MultimodalSystem.from_pretrained(model, device="cpu", log=None)
    encoded = list[int]()
    read = list[int]()
    patches = next(
        module for module in system.images.model.modules() if isinstance(module, torch.nn.Conv2d)
    )
    patches.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    system.llm.get_decoder().register_forward_pre_hook(
        lambda module, arguments, inputs: read.append(inputs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    rule = {
        "role": "system",
        "content": "Answer politely, with few words, and never about politics or the weather.",
    }
    conversation = [rule, *user(noise(1), "What is this?")]
    first = system.chat(conversation)
    other = system.chat([rule, *user("What is a dog?")])
    rule_length = len(system.tokenizer.encode_parts([rule["content"]]))
    assert max(read[len(first.ids) :]) <= other.prompt_tokens - rule_length
    read.clear()
    second = system.chat(
        [*conversation, {"role": "assistant", "content": first}, *user(noise(2), "And this?")]
    )
    assert len(encoded) == 2 and encoded[0] == encoded[1]
    assert max(read) <= second.prompt_tokens - first.prompt_tokens - len(first.ids) + 2


def test_chat_of_a_conversation_that_is_too_long(talking):
    turns = [
        message
        for index in range(30)
        for message in (
            *user(f"Tell me about the tall tree number {index}."),
            {"role": "assistant", "content": "It is a tree."},
        )
    ]
    answer = talking.chat([*turns, *user("And now?")])
    assert "longer than the model's context" in answer.note and "were left out" in answer.note
    with pytest.raises(GenerationError, match="context ends at"):
        talking.chat(user("a tree " * 2000))


def test_chat_whose_stream_is_closed(system):
    events = system.chat(user(noise(1), "What?"), stream=True, force_image=True)
    next(events)
    events.close()
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("seed-generate")
    ]


@pytest.mark.parametrize("steps", [None, 1])
def test_chat_previews_have_their_own_denoising_steps(tiny, monkeypatch, steps):
    """The previews of tiny's 8 and 16 codes, then the whole image; its folder draws in 2 steps."""
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


def test_push_to_hub_stays_offline(tiny):
    with pytest.raises(OSError, match="offline"):
        tiny.push_to_hub("owner/name")
    with pytest.raises(OSError, match="offline"):
        tiny.images.model.push_to_hub("owner/name")


def test_chat_with_should_stop(system):
    calls: list[int] = []
    answer = system.chat(
        user(noise(1), "What?"),
        force_image=True,
        should_stop=lambda: calls.append(1) or len(calls) > 3,
    )
    assert not answer.images and 3 <= len(calls) <= 5


def test_chat_with_messages_of_transformers_and_openai(system, tmp_path):
    noise(1).save(tmp_path / "a b.png")
    file = tmp_path / "a b.png"
    url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    forms = [
        file,
        {"type": "image", "image": str(file)},
        {"type": "image", "image": noise(1)},
        {"type": "image", "url": str(file)},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    answers = {str(system.chat(user(item, {"type": "text", "text": "What?"}))) for item in forms}
    assert len(answers) == 1
    for item, error in (
        ({"type": "image", "url": "https://host/a.png"}, RequestError),
        ({"type": "video"}, RequestError),
        (tmp_path / "absent.png", ImageError),
    ):
        with pytest.raises(error):
            system.chat(user(item, "What?"))


# ---- settings


@pytest.mark.parametrize(
    ("options", "expected"), [({"max_new_tokens": 50}, [50, 33]), ({}, [39, 33])]
)
def test_edit_with_text_before_the_image(tiny, options, expected, monkeypatch):
    limits: list[int] = []

    def write(conversations: Any, task: Any, settings: Any, *more: Any, **named: Any) -> Any:
        limits.append(settings.max_new_tokens)
        return plain(conversations, task, settings, *more, **named)

    plain = tiny.generate_answers
    monkeypatch.setattr(tiny, "generate_answers", write)
    monkeypatch.setattr(tiny, "tasks", replace(tiny.tasks, edit_words=6))
    tiny.edit(noise(1), "Make it red.", **FEW, **options)
    assert limits == expected


def test_unknown_options(system):
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        system.describe(noise(1), temprature=1.0)
    with pytest.raises(ConfigError, match="num_inference_steps"):
        system.draw("a fish", num_inference_step=2)
    with pytest.raises(ConfigError, match="num_inference_steps"):
        system.draw("a fish", num_inference_steps=0)


def test_num_return_sequences_is_refused(system):
    for call in (
        lambda **options: system.describe(noise(1), **options),
        lambda **options: system.ask(noise(1), "What is it?", **options),
        lambda **options: system.draw("a fish", **options),
        lambda **options: system.edit(noise(1), "Make it red.", **options),
        lambda **options: system.chat(user(noise(1)), **options),
    ):
        with pytest.raises(ConfigError, match="num_return_sequences: each request gets one answer"):
            call(num_return_sequences=2)
    text = system.describe(noise(1), num_return_sequences=1, seed=1)
    assert text == system.describe(noise(1), seed=1)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0, "top_p": 1.0}, {"temperature": 3.0, "top_p": 0.0}]
)
def test_describe_with_zero_temperature_or_top_p(system, options):
    greedy = system.describe(noise(1), do_sample=False, num_beams=1)
    assert [system.describe(noise(1), seed=seed, **options) for seed in (0, 0)] == [greedy, greedy]


def test_from_pretrained_without_decoder(system):
    reader = MultimodalSystem.from_pretrained(
        system.config, device="cpu", load_decoder=False, log=None
    )
    assert type(reader) is type(system) and reader.describe(noise(1)) == system.describe(noise(1))
    with pytest.raises(CheckpointError, match="no de-tokenizer"):
        reader.draw("a fish")


@pytest.mark.slow
def test_from_pretrained_with_offload(system):
    offloaded = MultimodalSystem.from_pretrained(
        system.config, device="cpu", offload=True, log=None
    )
    assert offloaded.describe(noise(1)) == system.describe(noise(1))
    assert same(offloaded.draw("a fish", 1, **FEW), system.draw("a fish", 1, **FEW))


def test_from_pretrained_compiled_with_offload(tiny):
    for parts in (True, ("llm",)):
        with pytest.raises(
            ConfigError, match="--compile does not work with an off-loaded language model"
        ):
            MultimodalSystem.from_pretrained(
                tiny.config, device="cpu", compiled=True, offload=parts, log=None
            )


@pytest.mark.process
@pytest.mark.slow
def test_compile_of_the_image_tokenizer(tiny):
    system = MultimodalSystem.from_pretrained(tiny.config, device="cpu", log=None)
    system.images.compile()
    assert system.tokenize(noise(1)).tolist() == tiny.tokenize(noise(1)).tolist()
    assert same(system.draw("a fish", 1, **FEW), tiny.draw("a fish", 1, **FEW))
    assert hasattr(
        system.images.decoder.unet.mid_block.attentions[0].transformer_blocks[0].attn1, "to_qkv"
    )


def test_save_pretrained(system, tmp_path):
    folder = system.save_pretrained(tmp_path / "mine")
    saved = MultimodalSystem.from_pretrained(folder, device="cpu", log=None)
    assert (
        saved.describe(noise(1)) == system.describe(noise(1))
        and "any-to-any" in (folder / "README.md").read_text()
    )
    assert same(saved.draw("a fish", 1, **FEW), system.draw("a fish", 1, **FEW))
    assert type(AutoModelForCausalLM.from_pretrained(saved.config.llm)) is type(system.llm)
