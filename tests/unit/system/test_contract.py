"""What every system does, on tiny random weights of each family: see, ask, draw, edit, chat, streams, seeds, batches,
threads."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seed_multimodal.errors import CheckpointError, ConfigError, GenerationError, ImageError, RequestError
from seed_multimodal.language.messages import Answer
from seed_multimodal.system.base import MultimodalSystem

FAMILIES = ("tiny", "tiny_x", "tiny_lavit")
SAMPLING = {"temperature": 2.0, "top_p": 1.0, "top_k": 0}
FEW = {"num_inference_steps": 2}
pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised")


@pytest.fixture(params=FAMILIES)
def system(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=FAMILIES[:2])
def talking(request: pytest.FixtureRequest) -> Any:
    """Systems that hold conversations."""
    return request.getfixturevalue(request.param)


def noise(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def same(one: Image.Image, other: Image.Image, grey: int = 1) -> bool:
    """Equal within one grey level."""
    return one.size == other.size and int(np.abs(np.int16(one) - np.int16(other)).max()) <= grey


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


# ---- batches


def test_describe_and_ask_of_a_list_are_those_of_each_image(system: Any) -> None:
    images = [noise(1), noise(2, (300, 20)), noise(3, (1, 1)), noise(4), noise(5)]
    assert system.describe(images, batch_size=3) == [system.describe(image) for image in images]
    questions = ["What is it?", "Is it a cat?", "Where?", "How many?", "Why?"]
    asked = system.ask(images, questions, batch_size=2)
    assert asked == [system.ask(image, text) for image, text in zip(images, questions, strict=True)]
    assert isinstance(system.describe(images[0]), str) and system.describe([]) == []


def test_draw_of_a_list_is_that_of_each_text(system: Any) -> None:
    texts = ["a red apple", "a blue fish"]
    both = system.draw(texts, seed=3, **FEW, **SAMPLING)
    assert all(same(one, system.draw(text, 3, **FEW, **SAMPLING)) for one, text in zip(both, texts, strict=True))
    four = system.draw("a fish", seed=5, num_images=4, **FEW, **SAMPLING)
    assert len(four) == 4 and same(four[2], system.draw("a fish", 7, **FEW, **SAMPLING))
    assert not same(four[0], four[1])


def test_edit_and_reconstruct_of_a_list_are_those_of_each_image(system: Any) -> None:
    images = [noise(1), noise(2)]
    edited = system.edit(images, "Make it red.", seed=2, **FEW)
    assert all(same(one, system.edit(image, "Make it red.", 2, **FEW))
               for one, image in zip(edited, images, strict=True))
    again = system.reconstruct(images, 3, **FEW)
    assert len(again) == 2 and same(again[1], system.reconstruct(images[1], 3, **FEW)[0])
    assert not same(again[0], system.reconstruct(images[0], 4, **FEW)[0])


def test_nested_lists_are_one_prompt_each(system: Any) -> None:
    one, two = noise(1), noise(2)
    both = system.describe([[one, two], one], **SAMPLING, seed=1)
    assert both[1] == system.describe(one, **SAMPLING, seed=1) and both[0] == system.describe(
        [[one, two]], **SAMPLING, seed=1)[0]


def test_files_bytes_and_arrays_are_images(system: Any, tmp_path: Path) -> None:
    image = noise(1)
    image.save(tmp_path / "a.png")
    file = tmp_path / "a.png"
    assert len(set(system.describe([image, file, str(file), file.read_bytes(), np.asarray(image)]))) == 1


# ---- seeds


def test_sampling_depends_on_the_seed_alone(system: Any) -> None:
    answers = [system.describe(noise(1), seed=seed, max_new_tokens=12, **SAMPLING) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    state = torch.get_rng_state()
    system.draw("a fish", 1, **FEW, **SAMPLING)
    assert torch.equal(torch.get_rng_state(), state)


def test_many_threads_answer_as_one_after_another(system: Any) -> None:
    """Texts are equal; features that are computed next to others differ in their last digits, and images with them."""
    jobs = [job for seed in range(2) for job in (
        lambda seed=seed: system.describe(noise(seed), seed=seed, **SAMPLING),
        lambda seed=seed: system.draw("a fish", seed, **FEW, **SAMPLING),
        lambda seed=seed: system.reconstruct(noise(seed), seed, **FEW)[0])]
    with ThreadPoolExecutor(6) as pool:
        together = [one.result() for one in [pool.submit(job) for job in jobs]]
    for one, other in zip(together, [job() for job in jobs], strict=True):
        assert one == other if isinstance(one, str) else same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["nano", "nano-x", "nano-lavit"])
def test_images_of_several_threads_are_drawn_in_common_batches(model: str) -> None:
    """As one by one within one grey level, in fewer loops of the U-Net; one that fails ends alone."""
    system = MultimodalSystem.from_pretrained(model, device="cpu", log=None)
    images, count = system.images, 8
    values = list(images.encode([noise(number) for number in range(count)]))
    alone = [images.draw([value], seeds=[seed])[0] for seed, value in enumerate(values)]
    loops: list[int] = []
    images.decoder.unet.register_forward_pre_hook(lambda module, args: loops.append(len(args[0])))
    images.draw(values[:1], seeds=[0])
    steps, barrier = len(loops), threading.Barrier(count + 1)

    def draw(seed: Any, value: Any) -> Image.Image:
        barrier.wait()
        return images.draw([value], seeds=[seed])[0]

    with ThreadPoolExecutor(count + 1) as pool:
        broken = pool.submit(draw, "no seed", values[0])
        together = [*pool.map(draw, range(count), values)]
    assert isinstance(broken.exception(), RuntimeError)
    assert all(same(one, other) for one, other in zip(together, alone, strict=True))
    loops.clear()
    barrier = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        assert all(same(one, other) for one, other in zip(pool.map(draw, range(count), values), alone, strict=True))
        codes = [*pool.map(images.encode, [[noise(number)] for number in range(count)])]
    assert len(loops) <= steps * count // 2 and max(loops) > 1
    if model != "nano-x":
        assert all(torch.equal(one[0], value) for one, value in zip(codes, values, strict=True))


# ---- conversations


@pytest.mark.parametrize("options", [{}, {"force_image": True}, {"seed": 5, **SAMPLING}, {"num_beams": 2}])
def test_stream_gives_what_chat_gives(system: Any, options: dict[str, Any]) -> None:
    options = {"seed": 1, "num_beams": 1, **options}
    plain = system.chat(user(noise(0), "What?"), **options)
    events = list(system.chat(user(noise(0), "What?"), stream=True, previews=(), **options))
    streamed = events[-1]["answer"]
    assert [event["type"] for event in events].count("done") == 1 and list(streamed.ids) == list(plain.ids)
    assert [event["codes"] for event in events if event["type"] == "image"] == plain.codes
    assert all(same(one, other) for one, other in zip(streamed.images, plain.images, strict=True))
    assert len(plain.images) >= bool(options.get("force_image"))
    text = "".join(event["text"] for event in events if event["type"] == "text")
    assert text.split() == " ".join(part for part in plain.parts if isinstance(part, str)).split()


def test_an_answer_is_part_of_the_next_turn(talking: Any) -> None:
    first = user(noise(1), "Make it red.")
    answer = talking.chat(first, force_image=True)
    turns = [*first, {"role": "assistant", "content": answer}, *user("And now?")]
    assert isinstance(talking.chat(turns), Answer) and talking.chat(turns, force_image=True).images
    system_role = [{"role": "system", "content": "Answer in verse."}, *turns]
    assert talking.chat(system_role, seed=1).ids


@pytest.mark.parametrize("model", ["nano", "nano-x"])
def test_the_next_turn_reads_only_what_is_new(model: str) -> None:
    """Each image is encoded once, and words that the language model has read, a shared system message too, are kept."""
    system = MultimodalSystem.from_pretrained(model, device="cpu", log=None)
    encoded, read = list[int](), list[int]()
    patches = next(module for module in system.images.model.modules() if isinstance(module, torch.nn.Conv2d))
    patches.register_forward_pre_hook(lambda module, given: encoded.append(len(given[0])))
    system.llm.get_decoder().register_forward_pre_hook(
        lambda module, arguments, given: read.append(given["inputs_embeds"].shape[1]), with_kwargs=True)
    rule = {"role": "system", "content": "Answer politely, with few words, and never about politics or the weather."}
    asked = [rule, *user(noise(1), "What is this?")]
    first = system.chat(asked)
    other = system.chat([rule, *user("What is a dog?")])
    words = len(system.tokenizer.encode_parts([rule["content"]]))
    assert max(read[len(first.ids):]) <= other.prompt_tokens - words
    read.clear()
    second = system.chat([*asked, {"role": "assistant", "content": first}, *user(noise(2), "And this?")])
    assert len(encoded) == 2 and encoded[0] == encoded[1]
    assert max(read) <= second.prompt_tokens - first.prompt_tokens - len(first.ids) + 2


def test_a_conversation_that_is_too_long_drops_its_oldest_turns(talking: Any) -> None:
    turns = [message for number in range(30) for message in (
        *user(f"Tell me about the tall tree number {number}."), {"role": "assistant", "content": "It is a tree."})]
    answer = talking.chat([*turns, *user("And now?")])
    assert "longer than the model's context" in answer.note and "were left out" in answer.note
    with pytest.raises(GenerationError, match="context ends at"):
        talking.chat(user("a tree " * 2000))


def test_leaving_a_stream_ends_its_thread(system: Any) -> None:
    events = system.chat(user(noise(1), "What?"), stream=True, force_image=True)
    next(events)
    events.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("seed-generate")]


def test_should_stop_ends_the_answer(system: Any) -> None:
    calls: list[int] = []
    answer = system.chat(user(noise(1), "What?"), force_image=True,
                         should_stop=lambda: calls.append(1) or len(calls) > 3)
    assert not answer.images and 3 <= len(calls) <= 5


def test_messages_of_transformers_and_openai(system: Any, tmp_path: Path) -> None:
    noise(1).save(tmp_path / "a b.png")
    file = tmp_path / "a b.png"
    import base64

    url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    forms = [file, {"type": "image", "image": str(file)}, {"type": "image", "image": noise(1)},
             {"type": "image", "url": str(file)}, {"type": "image_url", "image_url": {"url": url}}]
    answers = {str(system.chat(user(item, {"type": "text", "text": "What?"}))) for item in forms}
    assert len(answers) == 1
    for item, error in (({"type": "image", "url": "https://host/a.png"}, RequestError),
                        ({"type": "video"}, RequestError), (tmp_path / "absent.png", ImageError)):
        with pytest.raises(error):
            system.chat(user(item, "What?"))


# ---- settings


@pytest.mark.parametrize(("given", "expected"), [({"max_new_tokens": 50}, [50, 33]), ({}, [39, 33])])
def test_edit_keeps_max_new_tokens_where_the_model_may_speak_first(
    tiny: Any, given: dict[str, int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []

    def write(conversations: Any, task: Any, settings: Any, *more: Any, **options: Any) -> Any:
        limits.append(settings.max_new_tokens)
        return plain(conversations, task, settings, *more, **options)

    plain = tiny.write
    monkeypatch.setattr(tiny, "write", write)
    monkeypatch.setattr(tiny, "tasks", replace(tiny.tasks, edit_words=6))
    tiny.edit(noise(1), "Make it red.", **FEW, **given)
    assert limits == expected


def test_unknown_options_name_the_nearest(system: Any) -> None:
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        system.describe(noise(1), temprature=1.0)
    with pytest.raises(ConfigError, match="num_inference_steps"):
        system.draw("a fish", num_inference_step=2)
    with pytest.raises(ConfigError, match="num_inference_steps"):
        system.draw("a fish", num_inference_steps=0)


@pytest.mark.parametrize("how", [{"temperature": 0.0, "top_p": 1.0}, {"temperature": 3.0, "top_p": 0.0}])
def test_zero_temperature_or_top_p_is_greedy(system: Any, how: dict[str, float]) -> None:
    greedy = system.describe(noise(1), do_sample=False, num_beams=1)
    assert [system.describe(noise(1), seed=seed, **how) for seed in (0, 0)] == [greedy, greedy]


def test_a_system_without_decoder_reads(system: Any) -> None:
    closed = MultimodalSystem.from_pretrained(system.config, device="cpu", load_decoder=False, log=None)
    assert type(closed) is type(system) and closed.describe(noise(1)) == system.describe(noise(1))
    with pytest.raises(CheckpointError, match="no de-tokenizer"):
        closed.draw("a fish")


@pytest.mark.slow
def test_offloaded_parts_compute_the_same(system: Any) -> None:
    moved = MultimodalSystem.from_pretrained(system.config, device="cpu", offload=True, log=None)
    assert moved.describe(noise(1)) == system.describe(noise(1))
    assert same(moved.draw("a fish", 1, **FEW), system.draw("a fish", 1, **FEW))


@pytest.mark.process
@pytest.mark.slow
def test_compiled_images_are_the_same(tiny: Any) -> None:
    system = MultimodalSystem.from_pretrained(tiny.config, device="cpu", log=None)
    system.images.compile()
    assert system.tokenize(noise(1)).tolist() == tiny.tokenize(noise(1)).tolist()
    assert same(system.draw("a fish", 1, **FEW), tiny.draw("a fish", 1, **FEW))
    assert hasattr(system.images.decoder.unet.mid_block.attentions[0].transformer_blocks[0].attn1, "to_qkv")


def test_save_pretrained_writes_a_system_that_answers_the_same(system: Any, tmp_path: Path) -> None:
    folder = system.save_pretrained(tmp_path / "mine")
    again = MultimodalSystem.from_pretrained(folder, device="cpu", log=None)
    assert again.describe(noise(1)) == system.describe(noise(1)) and "any-to-any" in (folder / "README.md").read_text()
    assert same(again.draw("a fish", 1, **FEW), system.draw("a fish", 1, **FEW))


def test_parts_of_a_system_are_stock(system: Any) -> None:
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(system.config.llm)
    assert type(stock) is type(system.llm)
    with pytest.raises(TypeError):
        pickle.dumps(system)
