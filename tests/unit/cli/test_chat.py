"""`seed chat`, on a tiny random system."""

from __future__ import annotations

import io
import json
import sys

import pytest
from PIL import Image
from repository import ROOT

from seed_multimodal.cli.main import main

CAT = str(ROOT / "images" / "cat.jpg")


@pytest.fixture
def chat(capsys, tiny_folder, tmp_path):
    """Runs `seed chat`; returns exit code, lines and stderr."""

    def run(*flags: str) -> tuple[int, list[str], str]:
        code = main(
            ["chat", *flags, *f"--model {tiny_folder} --device cpu --out {tmp_path}".split()]
        )
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


def images_of(line: str) -> list[dict]:
    return [part for part in json.loads(line)["answer"] if "image" in part]


def test_chat_keeps_turns_and_saves_images(chat, tmp_path):
    flags = "--num-beams 2 --max-new-tokens 40 --force-image --json".split()
    code, lines, _ = chat("--image", CAT, "--message", "What is this?", "--message", "Now?", *flags)
    assert code == 0
    assert [json.loads(line)["message"] for line in lines] == ["What is this?", "Now?"]
    first, second = (images_of(line)[0] for line in lines)
    for part in (first, second):
        assert len(part["codes"]) == 32 and Image.open(part["image"]).size == (16, 16)
    assert first["image"] == f"{tmp_path}/image_0.png" != second["image"]
    # Another conversation does not overwrite these files; without --json it prints their names.
    before = len(list(tmp_path.iterdir()))
    _, lines, _ = chat("--message", "Draw!", "--force-image", "--max-new-tokens", "33")
    assert f"{tmp_path}/image_{before}.png" in "\n".join(lines)


def test_chat_reads_lines(chat, tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"no image")
    commands = [
        f"/image {tmp_path}/broken.png",
        f"/image {CAT}",
        "What is this?",
        "/reset",
        "/imgae",
    ]
    typed = "\n".join([*commands, "", "/draw Hello", "/quit", "no"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code, lines, errors = chat("--json")
    assert code == 0
    assert [json.loads(line)["message"] for line in lines] == ["What is this?", "Hello"]
    assert "broken.png" in errors and "/image" in errors  # the help, at a misspelt command
    assert images_of(lines[1])
    assert chat("--image", "nowhere.png", "--message", "x")[0] == 2
