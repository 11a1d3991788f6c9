"""SEED-X behind the demo's backend and page: pictures travel as pictures, boxes are shown on them."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import warm_python
from PIL import Image

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import image_to_base64
from seed_multimodal.language.seed_x import Box
from seed_multimodal.serving.chat_page import KINDS, ChatPage
from seed_multimodal.serving.flask_app import create_app
from seed_multimodal.serving.gate import Gate
from seed_multimodal.serving.schema import JSON_LINES
from seed_multimodal.systems.seed_x import SeedX

ROOT = Path(__file__).resolve().parents[3]
ASKED = {"temperature": 0, "max_new_tokens": 12, "seed": 1}
PAGE = {"max_turns": 3, "num_beams": 1, "max_new_tokens": 64, "temperature": 0.0, "top_p": 0.5}
NO_CODES = "holds codes, but the pictures of this model have none; send the picture itself."


def noise(seed: int, size: tuple[int, int] = (48, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def read(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


@pytest.fixture(scope="module")
def client(tiny_x: SeedX):
    return create_app(tiny_x).test_client()


def ask(client: Any, text: str, *images: Any, **more: Any) -> dict[str, Any]:
    sent = [image_to_base64(image) if isinstance(image, Image.Image) else image for image in images]
    response = client.post("/generate", json={**ASKED, "text": text, "images": sent, **more})
    return {"status": response.status_code, **json.loads(response.get_data(as_text=True))}


@pytest.fixture(scope="module")
def address(tiny_x_folder: Path) -> Iterator[str]:
    """The program itself, in a process of its own."""
    program = subprocess.Popen(
        [warm_python.PYTHON, str(ROOT / "gradio_demo" / "seed_llama_flask.py"), "--system", str(tiny_x_folder),
         "--port", "0", "--llm_device", "cpu", "--tokenizer_device", "cpu"], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    line = next(line for line in program.stdout if "answering at" in line)
    yield line.split("answering at ")[1].split()[0]
    program.terminate()
    assert program.wait(30) == 0


@pytest.mark.process
def test_the_program_answers_as_the_library(address: str, tiny_x: SeedX) -> None:
    """Two turns over a socket, pictures both ways, in one piece and as a stream."""
    shown = noise(0)
    question = {"text": "[INST] <image>What is it? [/INST]\n", "images": [image_to_base64(shown)], **ASKED}
    said = requests.post(address, json=question, timeout=60).json()
    expected = tiny_x.chat([user(shown, "What is it?")], max_new_tokens=12)
    assert said == {"text": str(expected), "images": [], "images_ids": [None], "error_msg": expected.problems}
    streamed = requests.post(address, json={**question, "previews": True}, timeout=60)
    assert streamed.json() == said and not streamed.headers["Content-Type"].startswith(JSON_LINES)

    edit = {"text": f"[INST] <image>What is it? [/INST]\n{said['text']}\n[INST] Make it red. [/INST]\n",
            "images": question["images"], "force_boi": True, **ASKED}
    drawn = requests.post(address, json=edit, timeout=60).json()
    messages = [user(shown, "What is it?"), {"role": "assistant", "content": str(expected)}, user("Make it red.")]
    picture = tiny_x.chat(messages, force_image=True, max_new_tokens=12, seed=1)
    assert np.array_equal(read(drawn["images"][0]), picture.images[0])
    assert drawn["images_ids"] == [None, None] and drawn["text"] == str(picture)

    again = {**edit, "text": f"{edit['text']}{drawn['text']}\n[INST] And blue? [/INST]\n",
             "images": [*edit["images"], drawn["images"][0]]}  # as a client repeats it
    second = requests.post(address, json=again, timeout=60).json()
    messages += [{"role": "assistant", "content": picture}, user("And blue?")]
    wanted = tiny_x.chat(messages, force_image=True, max_new_tokens=12, seed=1)
    assert np.array_equal(read(second["images"][0]), wanted.images[0]) and second["text"] == str(wanted)
    assert requests.post(address, json=again | {"previews": True}, timeout=60).json() == second


@pytest.mark.process
def test_a_page_over_the_program(address: str, tmp_path: Path) -> None:
    page = ChatPage(address, KINDS["seed-x-i"], tmp_path)
    dialogue = page.new_dialogue()
    noise(3).save(tmp_path / "mine.png")
    for text, force in (("Make it red.", True), ("And blue?", True), ("What is it?", False)):
        assert page.add(dialogue, str(tmp_path / "mine.png") if text.startswith("Make") else None, text) == ""
        assert list(page.answer(dialogue, force_boi=force, **PAGE)) == []  # pictures without codes have no previews
        assert all("box" in said for said in dialogue.errors)  # random weights open and close boxes as they like
    shown = page.messages(dialogue)
    assert Image.open(shown[0]["content"][0]["path"]).size == (48, 30)  # neither cut nor squashed
    drawn = [part for message in (shown[1], shown[3]) for part in message["content"] if isinstance(part, dict)]
    assert len(drawn) == 2 and all(abs(np.divide(*Image.open(part["path"]).size) - 1.6) < 0.1 for part in drawn)


def test_any_other_text_is_continued(client, tiny_x: SeedX) -> None:
    words = tiny_x.tokenizer.vocabulary
    said = ask(client, "Question: <image>What is this?\nAnswer:", noise(1))
    asked = tiny_x.to_request([("user", ["Question: ", noise(1), "What is this?\nAnswer:"])], task="text")
    assert asked.ids[:2] == [1, *tiny_x.tokenizer.encode("Question:")[:1]] and words.patches in asked.ids
    ids = tiny_x.speaker.answer(asked.ids, tiny_x.settings(max_new_tokens=12), reading=asked.reading)
    assert said["status"] == 200 and tiny_x.tokenizer.decode(ids[:2], True).strip() in said["text"]
    assert ask(client, "[INST] never closed")["status"] == 200
    assert len(ask(client, "a fish<image>", [0, 1, 2, 3], force_boi=True)["images"]) == 1


@pytest.mark.parametrize(("text", "images", "sentence"), [
    ("[INST] <image>? [/INST]\n", [[3, 2, 1, 0]], f"images[0] {NO_CODES}"),
    ("[INST] <image>? [/INST]\n", [[0, 1, 2, 3, 4]], f"images[0] {NO_CODES}"),
    ("[INST] <image><image>? [/INST]\n", [noise(0)], "'text' holds 2 <image> placeholders, but 'images' has 1 entries"),
    ("[INST] " + "word " * 2000 + "[/INST]\n", [], "context ends at 512"),
    ("[INST] " + "<image>" * 16 + "word " * 20 + "[/INST]\n", [noise(0, (64, 64))] * 16, "context ends at 512"),
    ("[INST] The <box_start><loc-1><loc-2><box_end>? [/INST]\n", [], "A box has 2 numbers instead of 4"),
    ("[INST] The <box_start><loc-1><loc-2><loc-3><loc-16><box_end>? [/INST]\n", [],
     "A box lies outside the grid of 16 places"),
])
def test_bad_requests(client, monkeypatch, text: str, images: list[Any], sentence: str) -> None:
    from seed_multimodal.serving import engine

    monkeypatch.setattr(engine, "open_image", lambda *_, **__: pytest.fail("a picture was decoded"))
    said = ask(client, text, *images)
    assert said["status"] == 400 and sentence in said["error"] and "\n" not in said["error"]


def test_a_picture_that_broke_off_is_left_out(client) -> None:
    said = ask(client, "[INST] Draw. [/INST]\nHere <image>\n[INST] And? [/INST]\n", [0, 1])
    assert said["status"] == 200 and said["images_ids"][0] == [0, 1]
    assert "images[0] broke off after 2 of 4 codes and was left out." in said["error_msg"]


def test_boxes_of_an_answer(tiny_x: SeedX, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are told as shares of the last picture, drawn on it by the page, and go back as words."""
    words = tiny_x.tokenizer.vocabulary
    answer = [*tiny_x.tokenizer.encode("a cat"), *Box(8, 4, 4, 2).ids(words), 2]
    monkeypatch.setattr(tiny_x.speaker, "answer", lambda *_, **__: answer)
    client = create_app(tiny_x).test_client()
    said = ask(client, "[INST] <image><image>Where is it? [/INST]\n", noise(0), noise(1))
    assert said["boxes"] == [{"image": 1, "box": [0.375, 0.1875, 0.625, 0.3125]}] and said["error_msg"] == []
    alone = ask(client, "[INST] Where is it? [/INST]\n")
    assert "boxes" not in alone and "no picture that they could lie on" in alone["error_msg"][0]

    page = ChatPage("", KINDS["seed-x-i"], tmp_path, post=lambda *_: iter([said]))
    dialogue = page.new_dialogue()
    for seed in range(2):
        noise(seed).save(tmp_path / f"{seed}.png")
        page.add(dialogue, str(tmp_path / f"{seed}.png"), None)
    page.add(dialogue, None, "Where is it?")
    assert list(page.answer(dialogue, force_boi=False, **PAGE)) == []
    text, found = page.messages(dialogue)[1]["content"]
    assert text == "a cat"
    shown = Image.open(found["path"])
    assert shown.size == (48, 30) and shown.getpixel((18, 5)) == shown.getpixel((29, 9)) == (0, 255, 0)
    assert shown.getpixel((24, 7)) == noise(1).getpixel((24, 7))

    page.add(dialogue, None, "Thanks")
    body = dialogue.request(lambda path: path)
    turns = [("user", [noise(0), noise(1), "Where is it?"]), ("assistant", [said["text"]]), ("user", ["Thanks"])]
    ids = tiny_x.to_request(turns).ids
    assert body is not None and said["text"] in body["text"]
    assert any(ids[place:place + 6] == list(Box(8, 4, 4, 2).ids(words)) for place in range(len(ids)))


@pytest.mark.parametrize(("answer", "sentence"), [
    ("<box_start><loc-1><loc-2><loc-3><box_end>", "A box has 3 numbers instead of 4"),
    ("<box_start><loc-1><loc-2><loc-3>", "A box is not closed"),
    ("</img> a cat", "Image words without an opening <img>."),
    ("<img><img_00000><img_00001>", "A picture broke off after 2 of 4 codes."),
])
def test_malformed_answers(tiny_x: SeedX, monkeypatch, answer: str, sentence: str) -> None:
    monkeypatch.setattr(tiny_x.speaker, "answer", lambda *_, **__: tiny_x.tokenizer.encode(answer))
    said = ask(create_app(tiny_x).test_client(), "[INST] <image>? [/INST]\n", noise(0))
    assert said["status"] == 200 and "boxes" not in said and len(said["error_msg"]) == 1
    assert sentence in said["error_msg"][0] and said["text"].count("<image>") == len(said["images"])


def test_the_released_server_never_served_it(tiny_x: SeedX) -> None:
    with pytest.raises(ConfigError, match="which served SEED-LLaMA alone"):
        create_app(tiny_x, exact_original=True)


def test_pictures_that_wait_have_a_limit(tiny_x: SeedX, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pictures are kept for the model: two of five requests may keep theirs, the others wait unread."""
    app = create_app(tiny_x)
    engine, read = app.extensions["seed_engine"], []
    engine._kept = Gate(2 * 3 * 48 * 30)
    transform = engine.backend.transform
    monkeypatch.setattr(engine.backend, "transform", lambda image: read.append(image) or transform(image))
    answers: list[dict[str, Any]] = []
    asking = [threading.Thread(target=lambda n=number: answers.append(
        ask(app.test_client(), "[INST] <image>What? [/INST]\n", noise(n), max_new_tokens=2))) for number in range(5)]
    with engine._model.hold():
        for one in asking:
            one.start()
        deadline = time.monotonic() + 60
        while (engine._admitted, len(read)) != (5, 2) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert (engine._admitted, len(read), engine._kept.inside) == (5, 2, engine._kept.capacity)
    for one in asking:
        one.join(60)
    assert [answer["status"] for answer in answers] == [200] * 5 and len(read) == 5
    assert ask(app.test_client(), "<image>", "bm9uZQ==")["status"] == 400  # refused: its place is free again
    assert ask(app.test_client(), "<image>", noise(1, (480, 300)), max_new_tokens=2)["status"] == 200  # alone, any size
    assert engine._kept.inside == 0
