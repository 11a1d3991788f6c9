"""Helpers of the server's tests: bodies of requests, answers, and a server in a thread."""

import base64
import collections
import contextlib
import http.server
import io
import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator

import requests
from PIL import Image

from seed_multimodal.images.io import image_to_base64

CHAT = "/v1/chat/completions"
# The text of `/generate` for a first message, of each family.
PROMPTS = {
    "seed_llama": "USER: {}\nASSISTANT:",
    "seed_x": "[INST] {} [/INST]\n",
    "lavit": "{}",
}
HI = PROMPTS["seed_llama"].format("hi")


# ---- images and messages


def read(text) -> Image.Image:
    """The image of base64 or a data URL."""
    data = text.rpartition("base64,")[2]
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def user(*content) -> dict:
    """OpenAI's message of texts, images and codes."""
    parts = []
    for item in content:
        if isinstance(item, str):
            parts.append({"type": "text", "text": item})
        elif isinstance(item, list):
            parts.append({"type": "image_url", "codes": item})
        else:
            url = f"data:image/png;base64,{image_to_base64(item)}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": parts}


# ---- requests by Flask's test client


def generate(client, text, *images, **settings) -> dict:
    """The answer of the original's route; images may be PIL images, base64 or codes."""
    sent = [image_to_base64(image) if isinstance(image, Image.Image) else image for image in images]
    response = client.post("/generate", json={"text": text, "images": sent, **settings})
    assert response.status_code == 200, response.json
    return response.json


def events(response) -> list[dict]:
    """The objects of a stream."""
    *blocks, end, nothing = response.get_data(as_text=True).split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    return [json.loads(block.partition("data: ")[2]) for block in blocks]


def chat(client, messages: list, **fields) -> dict:
    """The answer's message, finish_reason and usage; those of a stream must be the same."""
    body = {"messages": messages, "temperature": 0, **fields}
    response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.json
    choice = response.json["choices"][0]
    ends = {"finish_reason": choice["finish_reason"], "usage": response.json["usage"]}
    message = choice["message"]

    # The stream of the same request.
    body["stream_options"] = {"include_usage": True, "include_obfuscation": False}
    body["stream"] = True
    *chunks, last_chunk = events(client.post(CHAT, json=body))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    for name in ("content", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message.get(name, "")
    for name in ("images", "boxes", "notes"):
        assert [item for delta in deltas for item in delta.get(name, [])] == message[name]
    *before, last = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert (set(before), last) == ({None}, ends["finish_reason"])
    assert (last_chunk["choices"], last_chunk["usage"]) == ([], ends["usage"])
    assert {chunk["usage"] for chunk in chunks} == {None}
    return {**message, **ends}


def figures(client) -> dict[str, float]:
    """The values of `/metrics`."""
    lines = client.get("/metrics").get_data(as_text=True).splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


# ---- a server on loopback


class Running:
    """A server in a thread of this process."""

    def __init__(self, system, token: str = "", **limits: int):
        from seed_multimodal.serving.app import create_app, listen, serve
        from seed_multimodal.serving.schema import Limits

        app = create_app(system, limits=Limits(**limits), token=token)
        sock = listen("127.0.0.1", 0)  # any free port, which queues connections until it is served
        self.port = sock.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/generate"
        threading.Thread(target=serve, args=(app, sock), daemon=True).start()
        self.root = self.address.removesuffix("/generate")

    def ask(self, text=HI, **more) -> requests.Response:
        body = {"text": text, "images": [], "max_new_tokens": 4, **more}
        return requests.post(self.address, json=body, timeout=60)

    def health(self) -> dict:
        return requests.get(f"{self.root}/health", timeout=10).json()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def send_and_leave(self):
        """Ask for 400 tokens and close the connection."""
        body = {"text": HI, "images": [], "max_new_tokens": 400, "temperature": 5.0, "top_p": 1.0}
        with contextlib.suppress(requests.Timeout):
            requests.post(self.address, json=body, timeout=0.2)


@contextlib.contextmanager
def serving(
    command: list[str], ready: str = "answering at ", **options
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server as a process, ended by SIGTERM; yields its address, and the process."""
    # It is ready when it prints its address, behind the words `ready`.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    lines = process.stdout
    assert lines is not None
    try:
        line = next(line for line in lines if ready in line)
        # A full pipe would stop the server.
        threading.Thread(target=collections.deque, args=(lines, 0), daemon=True).start()
        yield line.split(ready)[1].split()[0], process
    finally:
        process.terminate()
        # 130 is the page's; the last one is of a test that kills it.
        assert process.wait(60) in (0, 130, -signal.SIGKILL)


@contextlib.contextmanager
def hostile_backend(answer: str) -> Iterator[int]:
    """The port of a server that answers every request with the same text."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        do_POST = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
