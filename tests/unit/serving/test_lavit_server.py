"""LaVIT behind the demo's backend and page: single messages, six shapes, its own settings."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import warm_python
from PIL import Image

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import image_to_base64
from seed_multimodal.lavit.ratios import RATIOS
from seed_multimodal.serving.chat_page import KINDS, ChatPage
from seed_multimodal.serving.flask_app import create_app
from seed_multimodal.serving.gate import Vanished
from seed_multimodal.serving.message_backend import MessageBackend
from seed_multimodal.serving.schema import parse_request
from seed_multimodal.systems.lavit import Lavit

ROOT = Path(__file__).resolve().parents[3]
PAGE = {"max_turns": 1, "num_beams": 3, "max_new_tokens": 64, "temperature": 1.0, "top_p": 0.5}
pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised")


def noise(seed: int, size: tuple[int, int] = (48, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def read(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def body(text: str, *images: Any, **more: Any) -> dict[str, Any]:
    sent = [image_to_base64(image) if isinstance(image, Image.Image) else image for image in images]
    return {"text": text, "images": sent, "seed": 3, **more}


HALF = base64.b64encode(base64.b64decode(image_to_base64(noise(1)))[:2000]).decode()  # only its header can be read


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The program: its address, and what it said until then."""
    program = subprocess.Popen(
        [warm_python.PYTHON, str(ROOT / "gradio_demo" / "seed_llama_flask.py"), "--system", str(folder), "--port", "0",
         "--llm_device", "cpu", "--tokenizer_device", "cpu"], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    lines: list[str] = []
    for line in program.stdout:
        lines.append(line)
        if "answering at" in line:
            break
    try:
        yield lines[-1].split("answering at ")[1].split()[0], lines
    finally:
        program.terminate()
        assert program.wait(30) == 0


@pytest.fixture(scope="module")
def client(tiny_lavit: Lavit) -> Any:
    return create_app(tiny_lavit).test_client()


def ask(client: Any, *asked: Any, **more: Any) -> dict[str, Any]:
    response = client.post("/generate", json=body(*asked, **more))
    return {"status": response.status_code, **json.loads(response.get_data(as_text=True))}


def test_captions_and_answers_are_the_librarys(client: Any, tiny_lavit: Lavit) -> None:
    """With its own settings, not the released SEED server's; `<image>` may stand anywhere."""
    shown, other = noise(1), noise(2)
    said = ask(client, "<image>", shown)
    assert (said["text"], said["images"], said["images_ids"]) == (tiny_lavit.describe(shown, seed=3), [], [None])
    message = {"role": "user", "content": [shown, "What is it?"]}
    assert ask(client, "<image> What is it?", shown)["text"] == str(tiny_lavit.chat([message], seed=3))
    assert ask(client, "What is it?<image>", shown)["text"] == str(tiny_lavit.chat([message], seed=3))
    assert ask(client, "<image><image>", shown, other)["text"] == tiny_lavit.describe([shown, other], seed=3)
    assert ask(client, "<image>", shown, temperature=2, max_new_tokens=5)["text"] == tiny_lavit.describe(
        shown, seed=3, temperature=2.0, max_new_tokens=5)


@pytest.mark.parametrize("ratio", [None, *RATIOS])
def test_pictures_in_every_shape(client: Any, tiny_lavit: Lavit, ratio: str | None) -> None:
    said = ask(client, "a red apple", force_boi=True, ratio=ratio)
    options = {"ratio": ratio} if ratio else {}
    expected = tiny_lavit.draw("a red apple", seed=3, **options)
    assert said["text"] == "<image>" and np.array_equal(read(said["images"][0]), expected)
    assert len(said["images_ids"]) == 1 and said["images_ids"][0] == tiny_lavit.write([["a red apple"]],
                                                                                      seed=3)[0].codes.tolist()


def test_words_pictures_and_codes_are_composed(client: Any, tiny_lavit: Lavit) -> None:
    shown, codes = noise(1), [1, 2, 3]
    said = ask(client, "<image> and <image> in the snow", shown, codes, force_boi=True)
    expected = tiny_lavit.compose([shown, "and", codes, "in the snow"], seed=3)
    assert np.array_equal(read(said["images"][0]), expected) and said["images_ids"][:2] == [None, codes]


@pytest.mark.parametrize(("asked", "more", "sentence"), [
    (("hello",), {}, "LaVIT answers about pictures: show one with the message"),
    (("<image>What?", [1, 2]), {}, "LaVIT reads pictures to answer; codes can be part of what is drawn only"),
    (("<image>snow", [99999]), {"force_boi": True}, "images[0]: "),
    (("<image>snow", []), {"force_boi": True}, "images[0]: A picture has 1 to"),
    (("  ",), {"force_boi": True}, "The message is empty"),
    (("a fish",), {"force_boi": True, "ratio": "5:4"}, "'ratio' is '5:4'; this model draws pictures in 1:1, 4:3,"),
    (("a fish",), {"force_boi": True, "ratio": 3}, "'ratio' must be a text, not int"),
    (("<image>",), {}, "'text' holds 1 <image> placeholders, but 'images' has 0 entries"),
    (("a fish " * 4000,), {"force_boi": True}, "The prompt has 1"),
    (("<image>" + "a fish " * 4000, HALF), {}, "The prompt has at least 1"),
    (("<image>" + "a fish " * 4000, HALF), {"force_boi": True}, "The prompt has at least 1"),
    (("<image>a fish ", HALF), {}, "images[0]: the picture is truncated"),
])
def test_what_cannot_be_answered_is_one_sentence(client: Any, asked: Any, more: Any, sentence: str) -> None:
    said = ask(client, *asked, **more)
    assert said["status"] == 400 and sentence in said["error"], said


def test_wrong_requests_do_not_wait_for_a_drawing(client: Any, tiny_lavit: Lavit) -> None:
    with ThreadPoolExecutor(1) as other, tiny_lavit.pictures.drawing():
        said = other.submit(ask, client, "a fish " * 4000, force_boi=True, ratio="3:2").result(30)
    assert said["status"] == 400 and "The prompt has" in said["error"]


def test_a_system_that_only_draws_or_reads_says_so(tiny_lavit_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_lavit_folder, tmp_path / "tiny"))
    draws = create_app(Lavit.from_pretrained(folder, device="cpu", modes=("generation",), log=None)).test_client()
    assert ask(draws, "a fish", force_boi=True)["status"] == 200
    said = ask(draws, "<image>", noise(1))
    assert said["status"] == 400 and "without the weights that read pictures" in said["error"]
    shutil.rmtree(folder / "decoder")
    reads = create_app(Lavit.from_pretrained(folder, device="cpu", log=None)).test_client()
    said = ask(reads, "a fish", force_boi=True)
    assert said["status"] == 400 and "its decoder of codes is not there: put it at" in said["error"]


@pytest.mark.process
def test_the_program_serves_a_folder_for_understanding(tiny_lavit_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_lavit_folder, tmp_path / "tiny"))
    shutil.rmtree(folder / "pixels")
    with serving(folder) as (address, lines):
        assert "its pixel decoder (unet, vae and scheduler) is not there: put it at" in "".join(lines)
        assert requests.post(address, json=body("<image>", noise(1)), timeout=60).json()["text"]
        said = requests.post(address, json=body("a fish", force_boi=True), timeout=60)
        assert said.status_code == 400 and "is not there: put it at" in said.json()["error"]


def test_a_client_that_left_ends_the_answer(tiny_lavit: Lavit) -> None:
    """At the third word of a caption or code of a picture: nothing is drawn."""
    backend = MessageBackend(tiny_lavit)
    for text, images, force in (("<image>", [noise(1)], False), ("a fish", [], True)):
        calls: list[int] = []

        def gone(calls: list[int] = calls) -> bool:
            calls.append(1)
            return len(calls) == 3

        request = parse_request({"text": text, "images": [""] * len(images), "force_boi": force}, gone=gone)
        with pytest.raises(Vanished):
            next(backend.reply(request, images, False))
        assert len(calls) == 3


def test_other_models_draw_in_one_shape_and_the_released_servers_quirks_are_not_lavits(
        tiny_lavit: Lavit, tiny_x: Any) -> None:
    said = ask(create_app(tiny_x).test_client(), "[INST] hello [/INST]\n", ratio="3:2")
    assert said["status"] == 400 and "'ratio' is '3:2'; this model draws pictures in one shape." in said["error"]
    with pytest.raises(ConfigError, match="exact_original repeats the released server"):
        create_app(tiny_lavit, exact_original=True)


@pytest.mark.process
def test_the_page_asks_the_program_message_by_message(tiny_lavit_folder: Path, tmp_path: Path) -> None:
    """Over a socket: a question, then a drawing of what was drawn and said; earlier messages are not sent again."""
    with serving(tiny_lavit_folder) as (address, _):
        chat_with(address, tmp_path)


def chat_with(address: str, tmp_path: Path) -> None:
    assert requests.get(address.replace("generate", "health"), timeout=60).json()["status"] == "ok"
    page = ChatPage(address, KINDS["nano-lavit"], tmp_path)
    dialogue = page.new_dialogue()
    noise(1, (60, 40)).save(tmp_path / "shown.png")
    for place in range(4):  # more rounds than `max_turns`
        assert page.add(dialogue, str(tmp_path / "shown.png"), "What is it?") == ""
        assert list(page.answer(dialogue, force_boi=False, ratio="3:2", **PAGE)) == []
        said = dialogue.conversation.messages[-1]["message"]
        assert len(dialogue.conversation.messages) == 2 * place + 2 and not dialogue.errors
        assert said["text"] and said["images"] == []
    assert page.add(dialogue, None, "a red apple") == ""
    assert list(page.answer(dialogue, force_boi=True, ratio="3:2", **PAGE)) == []
    drawn = dialogue.conversation.messages[-1]["message"]
    assert Image.open(drawn["images"][0]).size == (80, 48) and drawn["images_ids"][0]
    assert list(page.regenerate(dialogue, force_boi=True, ratio="2:3", **PAGE)) == []
    again = dialogue.conversation.messages[-1]["message"]
    assert Image.open(again["images"][0]).size == (48, 80) and len(page.messages(dialogue)) == 10


@pytest.mark.parametrize(("named", "asked"), [
    ("nano-lavit", "--system nano-lavit --port 7890 --port 1"), ("nano", "--system nano --port 7890 --port 1"),
    ("/a/folder", "--system /a/folder --port 7890 --port 1"), ("lavitt", "--system lavitt --port 7890 --port 1"),
    ("8b", "--model configs/llm/seed_llama_8b_8bit.yaml --port 7890")])
@pytest.mark.process
def test_the_script_starts_any_system(named: str, asked: str, tmp_path: Path) -> None:
    """A folder, too; what there is none of is left to the program's sentence."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho $*\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    done = subprocess.run(["bash", str(ROOT / "scripts" / "start_backend.sh"), named, "--port", "1"], text=True,
                          capture_output=True, env={**os.environ, "VIRTUAL_ENV": str(tmp_path)})
    assert done.returncode == 0 and asked in done.stdout, done.stderr


@pytest.mark.process
def test_the_page_needs_no_torch() -> None:
    loaded = subprocess.run([sys.executable, "-c", "import sys, seed_multimodal.serving.gradio_app\n"
                             "print([name for name in ('torch', 'diffusers') if name in sys.modules])"],
                            capture_output=True, text=True, cwd=ROOT, check=True, env=None).stdout
    assert loaded.strip() == "[]"
