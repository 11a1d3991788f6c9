"""Helpers of the server's tests: images, requests, and the server as a program."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import warm_python
from PIL import Image

from seed_multimodal.images.io import image_to_base64

PROGRAM = str(Path(__file__).resolve().parents[2] / "gradio_demo" / "seed_llama_flask.py")
ON_CPU = ("--port", "0", "--llm_device", "cpu", "--tokenizer_device", "cpu")


def noise(seed: int, size: tuple[int, int] = (48, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def read(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def body(text: str, *images: Any, **settings: Any) -> dict[str, Any]:
    """A request; images may be PIL images, base64 or codes."""
    sent = [image_to_base64(image) if isinstance(image, Image.Image) else image for image in images]
    return {"text": text, "images": sent, **settings}


def ask(client: Any, text: str, *images: Any, **settings: Any) -> dict[str, Any]:
    """The JSON of an answer, and its `status`."""
    response = client.post("/generate", json=body(text, *images, **settings))
    return {"status": response.status_code, **json.loads(response.get_data(as_text=True))}


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, str]]:
    """The program with the system in a folder: its address, and what it has printed."""
    program = subprocess.Popen([warm_python.PYTHON, PROGRAM, "--system", str(folder), *ON_CPU], stdout=subprocess.PIPE,
                               text=True)
    assert program.stdout is not None
    printed = ""
    for line in program.stdout:
        printed += line
        if "answering at" in line:
            break
    try:
        yield printed.split("answering at ")[1].split()[0], printed
    finally:
        program.terminate()
        assert program.wait(30) == 0
