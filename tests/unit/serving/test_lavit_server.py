"""LaVIT behind the server and the page: single messages, six ratios, its own settings."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from random_images import noise
from real_processes import run_process
from repository import ROOT
from served import ask, body, read, serving
from werkzeug.exceptions import ServiceUnavailable

from seed_multimodal.models.lavit.pipeline import Lavit
from seed_multimodal.models.registry import model_cards
from seed_multimodal.serving.app import create_app
from seed_multimodal.serving.backend import Backend, Deadline
from seed_multimodal.serving.chat_session import ChatSession
from seed_multimodal.serving.client import ModelClient
from seed_multimodal.serving.schema import GenerateRequest

pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised")


@pytest.fixture(scope="module")
def client(tiny_lavit: Lavit) -> Any:
    return create_app(tiny_lavit).test_client()


def test_generate_describes_and_answers_as_the_library(client, tiny_lavit: Lavit):
    """With LaVIT's own settings, but one beam; `<image>` may stand anywhere."""
    image = noise(1)
    other = noise(2)
    response = ask(client, "<image>", image, seed=3)
    expected = tiny_lavit.describe(image, seed=3, num_beams=1)
    assert (response["text"], response["images"], response["images_ids"]) == (expected, [], [None])
    answer = tiny_lavit.chat(
        [{"role": "user", "content": [image, "What is it?"]}], seed=3, num_beams=2
    )
    for text in ("<image> What is it?", "What is it?<image>"):
        assert ask(client, text, image, seed=3, num_beams=2)["text"] == str(answer)
    both = tiny_lavit.describe([[image, other]], seed=3, num_beams=1)[0]
    assert ask(client, "<image><image>", image, other, seed=3)["text"] == both


def test_generate_draws(client, tiny_lavit: Lavit):
    response = ask(client, "a red apple", seed=3, force_boi=True)
    assert response["text"] == "<image>" and np.array_equal(
        read(response["images"][0]), tiny_lavit.draw("a red apple", seed=3)
    )
    assert len(response["images_ids"]) == 1 and len(response["images_ids"][0]) > 0


def test_generate_composes_text_images_and_codes(client, tiny_lavit: Lavit):
    image = noise(1)
    codes = [1, 2, 3]
    response = ask(client, "<image> and <image> in the snow", image, codes, seed=3, force_boi=True)
    expected = tiny_lavit.compose([image, "and", codes, "in the snow"], seed=3)
    assert np.array_equal(read(response["images"][0]), expected) and response["images_ids"][:2] == [
        None,
        codes,
    ]


@pytest.mark.parametrize(
    ("arguments", "more", "sentence"),
    [
        (("hello",), {}, "LaVIT answers about images: show one with the message"),
        (
            ("<image>What?", [1, 2]),
            {},
            "LaVIT reads images to answer; codes can only be part of what is drawn",
        ),
        (("<image>snow", [99999]), {"force_boi": True}, "a code outside"),
        (("  ",), {"force_boi": True}, "Message 0 is empty"),
        (("a fish " * 4000,), {"force_boi": True}, "The prompt has 1"),
    ],
)
def test_generate_refuses_with_a_sentence(client, arguments, more, sentence):
    response = ask(client, *arguments, **more)
    assert response["status"] == 400 and sentence in response["error"], response


@pytest.mark.process
def test_program_serves_a_folder_for_reading(tiny_lavit_folder: Path, tmp_path):
    folder = Path(shutil.copytree(tiny_lavit_folder, tmp_path / "tiny"))
    shutil.rmtree(folder / "pixels")
    with serving(folder) as (address, printed):
        assert "its pixel decoder (unet, vae and scheduler) is not there" in printed
        assert requests.post(address, json=body("<image>", noise(1)), timeout=60).json()["text"]
        response = requests.post(address, json=body("a fish", force_boi=True), timeout=60)
        assert response.status_code == 400 and "its pixel decoder" in response.json()["error"]


@pytest.mark.parametrize(
    ("text", "images", "force"), [("<image>", [noise(1)], False), ("a fish", [], True)]
)
def test_backend_stops_when_the_client_leaves(tiny_lavit: Lavit, text, images, force):
    """At the third token of a caption or code of an image: nothing is drawn."""
    calls: list[int] = []

    def disconnected() -> bool:
        calls.append(1)
        return len(calls) >= 3

    request = GenerateRequest.model_validate(body(text, *images, force_boi=force))
    with pytest.raises(ServiceUnavailable):
        Backend(tiny_lavit).generate(request, Deadline(disconnected, 600))
    assert len(calls) <= 6


@pytest.mark.process
def test_page_asks_the_program_message_by_message(tiny_lavit_folder: Path, tmp_path, monkeypatch):
    """Questions, then a drawing of what was drawn and said; earlier messages are not sent again."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with serving(tiny_lavit_folder) as (address, _):
        session = ChatSession([model := ModelClient(address, model_cards()["nano-lavit"])], model)
        noise(1, (60, 40)).save(tmp_path / "shown.png")

        def submit(text: str, *files: str) -> None:
            session.on_submit({"text": text, "files": files})

        def reply(*settings: Any) -> Any:
            async def end() -> None:
                _ = [update async for update in session.reply(*settings, 1, 64, 0.0, 0.5, 3)]

            asyncio.run(end())
            return session.turns[-1]

        for index in range(3):
            submit("What is it?", str(tmp_path / "shown.png"))
            answer = reply(False, "3:2")
            assert [part["type"] for part in answer["content"]] == ["text"] and len(
                session.turns
            ) == 2 * index + 2
            assert not answer["below"]
        submit("a red apple")
        drawing = reply(True, "3:2")["content"][0]
        assert Image.open(drawing["path"]).size == (80, 56) and drawing["codes"]
        session.on_retry()
        assert (
            Image.open(reply(True, "2:3")["content"][0]["path"]).size == (56, 80)
            and len(session.turns) == 8
        )


@pytest.mark.parametrize(
    ("named", "argument"),
    [
        ("nano-lavit", "--system nano-lavit --port 7890 --port 1"),
        ("/a/folder", "--system /a/folder --port 7890 --port 1"),
        ("8b", "--model configs/llm/seed_llama_8b_8bit.yaml --quantization int8 --port 7890"),
    ],
)
@pytest.mark.process
def test_start_script_starts_any_system(named, argument, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho $*\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    done = run_process(
        ["bash", str(ROOT / "scripts" / "start_backend.sh"), named, "--port", "1"],
        env={**os.environ, "VIRTUAL_ENV": str(tmp_path)},
    )
    assert done.returncode == 0 and argument in done.stdout, done.stderr


@pytest.mark.process
def test_page_needs_no_torch():
    loaded = run_process(
        [
            sys.executable,
            "-c",
            "import sys, seed_multimodal.serving.page\n"
            "print([name for name in ('torch', 'diffusers') if name in sys.modules])",
        ],
        cwd=ROOT,
        check=True,
        env=None,
    ).stdout
    assert loaded.strip() == "[]"
