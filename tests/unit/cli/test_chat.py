"""`seed chat`, on a tiny random system."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from repository import ROOT

from seed_multimodal.cli.chat import Conversation
from seed_multimodal.cli.main import build_parser, main
from seed_multimodal.language.answer import Answer

CAT = str(ROOT / "images" / "cat.jpg")


@pytest.fixture
def chat(capsys, tiny_folder, tmp_path):
    """Runs `seed chat`; returns exit code, records and stderr."""

    def run(*flags: str) -> tuple[int, list[dict], str]:
        code = main(
            ["chat", *flags, *f"--model {tiny_folder} --device cpu --out {tmp_path} --json".split()]
        )
        captured = capsys.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines()], captured.err

    return run


def test_chat_keeps_turns_and_saves_images(chat, tmp_path):
    code, turns, _ = chat(
        "--image",
        CAT,
        "--message",
        "What is this?",
        "--message",
        "And now?",
        "--num-beams",
        "2",
        "--max-new-tokens",
        "40",
        "--force-image",
    )
    assert code == 0 and [turn["message"] for turn in turns] == ["What is this?", "And now?"]
    images = [part for turn in turns for part in turn["answer"] if "image" in part]
    assert Path(images[0]["image"]).name == "image_0.png" and len(images) >= 2
    assert all(
        len(part["codes"]) == 32 and Image.open(part["image"]).size == (16, 16) for part in images
    )
    _, turns, _ = chat(
        "--message", "Draw!", "--force-image"
    )  # another conversation does not overwrite these files
    assert (
        next(part for part in turns[0]["answer"] if "image" in part)["image"]
        == f"{tmp_path}/image_{len(images)}.png"
    )


def test_chat_reads_lines(chat, tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"no image")
    typed = (
        f"/image {tmp_path}/broken.png\n/image {CAT}\nWhat is this?\n/reset\n/imgae\n\n"
        "/draw Hello\n/quit\nno\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code, turns, errors = chat()
    assert code == 0 and [turn["message"] for turn in turns] == ["What is this?", "Hello"]
    assert (
        "broken.png" in errors and "Type a message;" in errors and "A new conversation." in errors
    )
    assert any("image" in part for part in turns[1]["answer"])
    assert chat("--image", "nowhere.png", "--message", "x")[0] == 2


def test_follow_prints_text_and_files(tiny, tmp_path, capsys):
    events = [
        {"type": "image", "codes": [1], "image": None},
        {"type": "text", "text": "Here"},
        {"type": "text", "text": " it is."},
        {"type": "image_broken", "reason": "31 codes"},
        {"type": "done", "answer": Answer((), note="Unknown words.")},
    ]
    talk = Conversation(tiny, build_parser().parse_args(["chat", "--out", str(tmp_path)]))
    talk._follow(iter(events))
    assert (
        capsys.readouterr().out.split()
        == "[image: not drawn] Here it is. [31 codes] [Unknown words.]".split()
    )
