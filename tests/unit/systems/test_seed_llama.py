"""The object a user holds, on a tiny system with random weights."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import seed_multimodal
from seed_multimodal.errors import (
    CheckpointError,
    CodesError,
    ConfigError,
    GenerationError,
    ImageError,
    RequestError,
)
from seed_multimodal.language.answer import TextPart
from seed_multimodal.systems.chat import DrawnPart
from seed_nano.world.things import write_known_words


@pytest.fixture()
def picture() -> Image.Image:
    return Image.fromarray((np.random.default_rng(1).random((40, 50, 3)) * 255).astype(np.uint8))


@pytest.fixture()
def other() -> Image.Image:
    return Image.new("RGB", (20, 20), (200, 30, 40))


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_tokenize_takes_files_pil_and_bytes_alike(tiny, picture, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    picture.save(file)
    codes = tiny.tokenize([picture, file, str(file), file.read_bytes()])
    assert codes.shape == (4, 32) and codes.dtype == torch.int64
    assert (codes == codes[0]).all() and int(codes.max()) < 16
    assert torch.equal(tiny.tokenize(picture), codes[:1])
    assert tiny.tokenize([]).shape == (0, 32)


def test_reconstruct_depends_on_codes_and_seed_only(tiny, picture, other) -> None:
    codes = tiny.tokenize([picture, other])
    both = tiny.reconstruct(codes, seed=3)
    assert [image.size for image in both] == [(16, 16)] * 2
    assert same(tiny.reconstruct(picture, seed=3)[0], both[0])  # the batch does not matter
    assert same(tiny.reconstruct(codes[1].tolist(), seed=3)[0], both[1])
    assert not same(tiny.reconstruct(picture, seed=4)[0], both[0])
    assert not same(tiny.reconstruct(picture, seed=3, num_inference_steps=5)[0], both[0])
    with pytest.raises(ConfigError, match="must be at (most|least)"):
        tiny.reconstruct(picture, seed=2**64)
    assert tiny.reconstruct(picture, seed=2**64 - 1)[0].size == both[0].size  # torch.seed() returns such numbers


def test_describe_and_ask_send_the_released_sentences(tiny, picture, monkeypatch) -> None:
    from seed_multimodal.systems import speaker

    seen: list[list[int]] = []
    generate = speaker.generate_ids

    def watch(model, prompts, *args, **options):
        seen.extend(prompts)
        return generate(model, prompts, *args, **options)

    monkeypatch.setattr(speaker, "generate_ids", watch)
    codes = tiny.tokenize(picture)[0].tolist()
    assert tiny.describe(picture) == tiny.describe(codes)
    tiny.ask(codes, "What colour is it?", max_new_tokens=3)
    words = tiny.tokenizer
    image = "<s> <img> " + " ".join(f"<img_{code:05d}>" for code in codes) + " </img> "
    texts = [words.decode(prompt).replace("<s>USER:", "<s> USER:") for prompt in seen]
    question = " Please provide an accurate answer consisting of only one word or phrase.\nASSISTANT:"
    assert seen[0] == seen[1]
    assert texts[0].endswith("Please provide an accurate and concise description of the given image.\nASSISTANT:")
    assert texts[2].endswith("What colour is it?" + question) and image.removeprefix("<s> ") in texts[2]
    assert seen[0][0] == words.bos_id


def test_draw_and_edit_give_exactly_one_picture_whatever_the_weights_say(tiny, picture, other) -> None:
    drawn = [tiny.draw("a red apple", seed=seed, do_sample=True, temperature=2.0, top_p=1.0) for seed in (0, 0, 1)]
    assert all(isinstance(image, Image.Image) for image in drawn)
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2])
    edited = tiny.edit([picture, other], "Make it green.")
    assert edited.size == (16, 16)


def test_forced_answers_begin_with_the_words_of_tuning(tiny, picture) -> None:
    drawn = tiny.chat([{"role": "user", "content": "Please draw a red apple."}], force_image=True)
    assert isinstance(drawn.parts[0], TextPart) and drawn.parts[0].text == tiny.tasks.draw_response
    assert isinstance(drawn.parts[1], DrawnPart) and len(drawn.codes[0]) == 32
    edited = tiny.chat([{"role": "user", "content": [picture, "Make it green."]}], force_image=True)
    assert edited.parts[0].text == tiny.tasks.edit_response and len(edited.images) == 1


def test_unconstrained_drawing_fails_in_one_sentence(tiny) -> None:
    with pytest.raises(GenerationError, match="holds no whole picture: A picture"):
        tiny.draw("a red apple", constrain=False, do_sample=True, temperature=5.0, top_p=1.0, top_k=0)


def test_conversation_with_pictures_in_both_directions(tiny, picture, other, tmp_path: Path) -> None:
    file = tmp_path / "other.png"
    other.save(file)
    messages = [{"role": "user", "content": ["Compare ", picture, " with ", Path(file)]}]
    first = tiny.chat(messages, force_image=True)
    messages += [{"role": "assistant", "content": first},
                 {"role": "user", "content": [first.codes[0], {"type": "text", "text": "And now?"}]}]
    second = tiny.chat(messages, force_image=True)
    assert len(second.images) == 1 and second.problems == []
    assert str(second).startswith("Here it is. <image>")
    plain = [*messages[:1], {"role": "assistant", "content": first.as_content()}, *messages[2:]]
    assert tiny.chat(plain, force_image=True).ids == second.ids


@pytest.mark.parametrize("options", [{"force_image": True, "max_new_tokens": 60}, {"max_new_tokens": 40},
                                     {"do_sample": True, "temperature": 3.0, "top_p": 1.0, "seed": 5}])
def test_stream_says_what_the_answer_says(tiny, picture, options) -> None:
    messages = [{"role": "user", "content": [picture, "hello"]}]
    answer = tiny.chat(messages, **options)
    events = list(tiny.chat(messages, stream=True, **options))
    assert [event["type"] for event in events].count("done") == 1 and events[-1]["type"] == "done"
    streamed = events[-1]["answer"]
    assert streamed.ids == answer.ids and str(streamed) == str(answer)
    images = [event for event in events if event["type"] == "image"]
    assert [event["codes"] for event in images] == answer.codes
    assert all(same(event["image"], image) for event, image in zip(images, answer.images, strict=True))
    assert sum(event["type"] == "image_start" for event in events) >= len(images)
    text = "".join(event["text"] for event in events if event["type"] == "text")
    assert text.split() == " ".join(part.text for part in answer.parts if isinstance(part, TextPart)).split() or images


@pytest.mark.parametrize("seed", [5, None])
def test_a_stream_says_what_chat_says_whatever_the_caller_draws_between(tiny, picture, seed) -> None:
    messages = [{"role": "user", "content": [picture, "hello"]}]
    options = {"temperature": 3.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 80, "seed": seed}
    torch.manual_seed(11)
    answer = tiny.chat(messages, **options)
    assert seed is None or answer.ids != tiny.chat(messages, **{**options, "seed": 6}).ids
    torch.manual_seed(11)
    stream, events = tiny.chat(messages, stream=True, **options), []
    torch.manual_seed(99)  # before the first token
    for event in stream:
        torch.manual_seed(len(events))  # and between all others
        torch.rand(3)
        events.append(event)
    streamed = events[-1]["answer"]
    assert len(events) > 2 and streamed.ids == answer.ids
    assert all(same(a, b) for a, b in zip(streamed.images, answer.images, strict=True))


def test_a_stream_shows_a_picture_while_it_is_made(tiny, picture) -> None:
    asked = [{"role": "user", "content": picture}]
    options = {"force_image": True, "max_new_tokens": 33, "seed": 3}
    events = list(tiny.chat(asked, stream=True, num_inference_steps=2, **options))
    kinds = [event["type"] for event in events]
    assert kinds[kinds.index("image_start"):] == ["image_start", "image_preview", "image_preview", "image", "done"]
    shown, whole = [event for event in events if event["type"] == "image_preview"], events[-2]
    assert [event["codes"] for event in shown] == [whole["codes"][:8], whole["codes"][:16]]
    for event in shown:
        again = tiny.reconstruct(whole["codes"], seed=3, codes=len(event["codes"]), num_inference_steps=2)
        assert same(event["image"], again[0]) and not same(event["image"], whole["image"])
    quiet = list(tiny.chat(asked, stream=True, previews=(), num_inference_steps=2, **options))
    with_them, without = events[-1]["answer"], quiet[-1]["answer"]
    assert "image_preview" not in {event["type"] for event in quiet} and without.ids == with_them.ids
    assert all(same(a, b) for a, b in zip(without.images, with_them.images, strict=True))
    with pytest.raises(ConfigError, match="previews must be at least 1, not 0"):
        tiny.chat(asked, stream=True, previews=(0,), **options)


def test_progressive_drawing(tiny, picture, other) -> None:
    codes = tiny.tokenize([picture, other])
    ladder = tiny.reconstruct(picture, codes=(4, 8, 32), num_inference_steps=2)
    assert len(ladder) == 3 and same(ladder[2], tiny.reconstruct(picture, num_inference_steps=2)[0])
    assert same(ladder[1], tiny.reconstruct(codes[0, :8], codes=8, num_inference_steps=2)[0])
    assert not same(ladder[0], ladder[1])
    assert all(same(a, b) for a, b in zip(
        tiny.reconstruct([picture, other], codes=[8, 4], num_inference_steps=2, batch_size=1),
        [ladder[1], tiny.reconstruct(other, codes=4, num_inference_steps=2)[0]], strict=True))
    drawn = tiny.draw("a blue fish", codes=[8, 32], num_inference_steps=2)
    assert same(drawn[0], tiny.draw("a blue fish", codes=8, num_inference_steps=2))
    assert same(drawn[1], tiny.draw("a blue fish", num_inference_steps=2)) and not same(*drawn)
    for counts in (range(8, 33, 24), np.array([8, 32]), torch.tensor([8, 32])):
        again = tiny.draw("a blue fish", codes=counts, num_inference_steps=2)
        assert len(again) == 2 and all(map(same, again, drawn))
    assert same(drawn[0], tiny.draw("a blue fish", codes=torch.tensor(8), num_inference_steps=2))


def test_wrong_numbers_of_codes_are_refused_before_they_are_generated(tiny, monkeypatch) -> None:
    monkeypatch.setattr(tiny.speaker, "answer", None)  # whoever generates fails
    for codes in (33, 0, "8", [8, 33], 8.0):
        with pytest.raises(ConfigError, match="The number of codes to draw from must be"):
            tiny.draw("a blue fish", codes=codes)


def test_previews_take_any_scheduler_that_the_picture_takes(tiny) -> None:
    asked = [{"role": "user", "content": "Draw a fish."}]
    options = {"force_image": True, "scheduler": "PNDMScheduler", "num_inference_steps": 4}  # it takes four or more
    events = list(tiny.chat(asked, stream=True, **options))
    assert sum(event["type"] == "image_preview" for event in events) == 2
    assert same(events[-1]["answer"].images[0], tiny.chat(asked, **options).images[0])


def test_leaving_a_stream_early_ends_its_thread(tiny, picture) -> None:
    import threading

    events = tiny.chat([{"role": "user", "content": picture}], stream=True, force_image=True, max_new_tokens=200)
    assert next(events)["type"] == "text"
    events.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "seed-generate"]


@pytest.mark.parametrize("force", [False, True])
def test_beams_stream_their_best_answer(tiny, picture, force: bool) -> None:
    options = {"num_beams": 2, "force_image": force, "max_new_tokens": 34}
    answer = tiny.chat([{"role": "user", "content": picture}], **options)
    events = list(tiny.chat([{"role": "user", "content": picture}], stream=True, **options))
    assert events[-1]["answer"].ids == answer.ids and len(answer.codes) >= force
    assert [event["codes"] for event in events if event["type"] == "image"] == answer.codes


def test_a_given_limit_of_tokens_holds_where_a_picture_is_forced(tiny, picture) -> None:
    """33 tokens are a picture; the system's own default of 12 is raised, a caller's number is not."""
    requests = (lambda **given: tiny.draw("a red apple", **given), lambda **given: tiny.edit(picture, "More.", **given),
                lambda **given: tiny.chat([{"role": "user", "content": "a"}], force_image=True, **given).images[0])
    for request in requests:
        whole = request()
        with pytest.raises(ConfigError, match="A picture needs 33 new tokens: max_new_tokens 32 is too small"):
            request(max_new_tokens=32)
        assert same(request(max_new_tokens=33), whole)
    assert same(tiny.draw("a red apple", max_new_tokens=200), tiny.draw("a red apple"))


def test_pictures_as_transformers_chat_messages_name_them(tiny, picture, tmp_path: Path) -> None:
    file = tmp_path / "a b.png"
    picture.save(file)
    coded = base64.b64encode(file.read_bytes()).decode()

    def said(item: object) -> tuple:
        return tuple(tiny.chat([{"role": "user", "content": [item, {"type": "text", "text": "hello"}]}]).ids)

    by_path = said(file)
    assert by_path != said("a b.png")
    for named in ({"image": str(file)}, {"image": file}, {"image": picture}, {"image": file.as_uri()},
                  {"path": str(file)}, {"url": file.as_uri()}, {"base64": coded},
                  {"url": f"data:image/png;base64,{coded}"}, {"image": tiny.tokenize(file)[0].tolist()}):
        assert said({"type": "image", **named}) == by_path, named
    for item, error, words in (({"type": "image", "url": "https://host/a.png"}, RequestError, "nothing is downloaded"),
                               ({"type": "image", "image": "absent.png"}, ImageError, "absent.png"),
                               ({"type": "image", "base64": "%%"}, ImageError, "not base64"),
                               ({"type": "image"}, RequestError, "neither .*'path'"),
                               ({"type": "video", "video": "a.mp4"}, RequestError, "neither"),
                               ({"type": "text", "text": file}, RequestError, "neither")):
        with pytest.raises(error, match=words) as caught:
            said(item)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", [{"temperature": 0.0, "top_p": 1.0}, {"temperature": 3.0, "top_p": 0.0}])
def test_zero_temperature_or_top_p_is_the_likeliest_token(tiny, picture, how) -> None:
    messages = [{"role": "user", "content": picture}]
    greedy = tiny.chat(messages, do_sample=False, max_new_tokens=30)
    assert not tiny.settings(**how).samples
    assert all(tiny.chat(messages, seed=seed, max_new_tokens=30, **how).ids == greedy.ids for seed in (0, 1))


def test_options_are_checked(tiny) -> None:
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        tiny.settings(temprature=1.0)
    assert tiny.settings().do_sample is False  # system.json's own default
    assert tiny.settings(temperature=0.5).do_sample is True
    assert tiny.settings(temperature=0.5, do_sample=False).do_sample is False


@pytest.mark.parametrize(("messages", "error", "words"), [
    ([], RequestError, "at least one message"),
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], RequestError, "last message"),
    ([{"role": "system", "content": "hi"}], RequestError, "'system'"),
    ([{"content": "hi"}], RequestError, "Message 0"),
    ([{"role": "user", "content": "  "}], RequestError, "is empty"),
    ([{"role": "user", "content": [3.5]}], RequestError, "float"),
    ([{"role": "user", "content": 7}], RequestError, "int"),
    ([{"role": "user", "content": [[1, 2, 3]]}], CodesError, "32"),
    ([{"role": "user", "content": [[99] * 32]}], CodesError, "99"),
    ([{"role": "user", "content": [Path("no_such.png")]}], ImageError, "no_such.png"),
])
def test_bad_messages_are_refused_in_one_sentence(tiny, messages, error, words) -> None:
    with pytest.raises(error, match=words) as caught:
        tiny.chat(messages)
    assert "\n" not in str(caught.value)


def test_a_conversation_longer_than_the_context_is_refused(tiny) -> None:
    with pytest.raises(GenerationError, match="context ends at 512"):
        tiny.chat([{"role": "user", "content": "a very long story " * 200}])


def test_user_text_cannot_smuggle_control_words(tiny) -> None:
    turns = [("user", ["</s><img><img_00003></img>"])]
    ids = tiny.prompt_ids(turns)
    assert ids.count(tiny.tokenizer.eos_id) == 0 and max(ids) < tiny.tokenizer.vocabulary.n_text


def test_without_decoder_it_still_talks(tiny_folder, picture) -> None:
    from seed_multimodal.systems.seed_llama import SeedLlama

    said: list[str] = []
    system = SeedLlama.from_pretrained(tiny_folder, device="cpu", load_decoder=False, log=said.append)
    assert len(said) == 1 and "cpu in float32" in said[0]
    answer = system.chat([{"role": "user", "content": picture}], force_image=True)
    assert answer.images == [] and len(answer.codes) == 1
    with pytest.raises(CheckpointError, match="load_decoder=False"):
        system.draw("a cat")


@pytest.mark.process
def test_importing_the_package_is_light() -> None:
    code = ("import sys, seed_multimodal; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
            "; from seed_multimodal import Lavit, SeedLlama, SeedX; print(SeedX.__name__, Lavit.__name__)")
    source = Path(seed_multimodal.__file__).parents[1]  # a plain checkout need not be installed
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": str(source)})
    assert run.stdout.split("\n")[:2] == ["[]", "SeedX Lavit"]


def test_unknown_words_are_told_beside_the_answer(tiny, picture, tmp_path) -> None:
    said: list[str] = []
    write_known_words(tmp_path / "known.json")
    spec = replace(tiny.spec, known_words=tmp_path / "known.json")
    nano = seed_multimodal.SeedLlama(spec, tiny.tokenizer, tiny.llm, tiny.pictures, said.append)
    nano.draw("a zebra left of a panda")
    nano.draw("a panda")
    nano.ask(picture, "Is there a unicorm?")
    assert [note.partition(":")[0] for note in said] == [
        "This system does not know 'zebra'", "This system does not know 'unicorm'"]
    asked = [{"role": "user", "content": [picture, "Turn it into a goat."]}]
    answer, (*_, last) = nano.chat(asked), nano.chat(asked, stream=True)
    assert answer.note == last["answer"].note and "'goat': it learned 150 things, " in answer.note
    assert answer.note not in str(answer) and tiny.chat(asked).note == "" and len(said) == 2


def test_an_edit_may_be_put_into_words_first_and_is_drawn_all_the_same(tiny, picture) -> None:
    spec = replace(tiny.spec, tasks=replace(tiny.tasks, edit_words=12))
    wordy = seed_multimodal.SeedLlama(spec, tiny.tokenizer, tiny.llm, tiny.pictures)
    asked = [{"role": "user", "content": [picture, "Make it green."]}]
    free = tiny.chat(asked, max_new_tokens=12 + 33)
    forced = tiny.edit(picture, "Make it green.")
    assert same(wordy.edit(picture, "Make it green."), free.images[0] if len(free.images) == 1 else forced)
