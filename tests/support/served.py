"""Helpers of the server's tests: images, requests, and the server in a thread or a process."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import warm_python
from PIL import Image
from repository import ROOT
from waiting import wait_until

from seed_multimodal.images.io import image_to_base64
from seed_multimodal.serving.app import create_app, listen, serve
from seed_multimodal.serving.schema import Limits

PROGRAM = str(ROOT / "gradio_demo" / "seed_llama_flask.py")
CHAT = "USER: hi\nASSISTANT:"
ON_CPU = "--port 0 --llm_device cpu --tokenizer_device cpu".split()


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


class Running:
    """A server in a thread of this process."""

    def __init__(self, system: Any, token: str = "", **limits: int) -> None:
        logged: list[str] = []
        app = create_app(system, limits=Limits(**limits), token=token)
        threading.Thread(
            target=serve, args=(app, listen("127.0.0.1", 0), logged.append), daemon=True
        ).start()
        wait_until(lambda: logged)
        self.address = logged[-1].split("answering at ")[1].split()[0]
        self.port = int(self.address.split(":")[2].split("/")[0])
        self.root = self.address.removesuffix("/generate")
        self.headers = {"Authorization": f"Bearer {token}"}

    def ask(self, text: str = CHAT, **more: Any) -> requests.Response:
        return requests.post(
            self.address, json={"text": text, "images": [], "max_new_tokens": 4, **more}, timeout=60
        )

    def health(self) -> dict[str, Any]:
        return requests.get(self.address.replace("generate", "health"), timeout=10).json()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def send_and_leave(self) -> None:
        long = {"max_new_tokens": 400, "temperature": 5.0, "top_p": 1.0}
        body = json.dumps({"text": CHAT, "images": [], **long}).encode()
        with self.connect() as sock:
            sock.sendall(
                b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            time.sleep(0.1)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, str]]:
    """The program with the system of a folder; yields its address and output."""
    program = subprocess.Popen(
        [warm_python.PYTHON, PROGRAM, "--system", str(folder), *ON_CPU],
        stdout=subprocess.PIPE,
        text=True,
    )
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
