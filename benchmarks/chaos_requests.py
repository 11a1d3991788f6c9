"""Requests of `chaos.py` to every route, and the comparison of their answers."""

from __future__ import annotations

import io
import json
import random
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from serving import Client

from seed_multimodal.images.io import bytes_from_base64, image_to_base64, image_to_bytes, open_image

ROUNDING = 1  # grey level: an image that is drawn in a batch may differ by so much
FIELD = b'--edit\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'  # of a form
OUT_OF_MEMORY = "The server ran out of memory"
PNG = re.compile(r"iVBORw0KGgo[A-Za-z0-9+/=]+")


@dataclass(frozen=True)
class Job:
    """A request."""

    path: str
    body: bytes
    content_type: str = "application/json"


def json_job(path: str, **fields: object) -> Job:
    return Job(path, json.dumps(fields).encode())


def make_jobs(client: Client, rng: random.Random, count: int) -> list[Job]:
    """Different requests, `count` of each route; some are refused by some of the systems."""
    jobs: list[Job] = []
    for index in range(count):
        image = next(client.images)
        encoded = image_to_base64(image)
        codes = [rng.randrange(200) for _ in range(32)]
        stream = bool(index % 2)
        sampled = {"temperature": 0.7, "top_p": 0.9, "seed": index}
        form = b""
        for name, value in {"prompt": b"Make it night.", "seed": b"%d" % index}.items():
            form += FIELD % (name.encode(), value)
        form += FIELD % (b'image"; filename="a.png', image_to_bytes(image)) + b"--edit--"
        chat = "/v1/chat/completions"
        jobs += [
            json_job(chat, **client.body("describe"), stream=stream),
            json_job(chat, **client.body("ask"), **sampled),
            json_job(chat, **client.body("draw"), stream=stream),
            json_job(
                "/generate",
                text="USER: <image>What is it?\nASSISTANT:",
                images=[encoded],
                seed=index,
            ),
            json_job("/v1/images/generations", prompt="a red fox on a hill", seed=index),
            json_job("/v1/images/tokens", images=[encoded]),
            json_job("/v1/images/tokens", codes=[codes], seed=index),
            Job("/v1/images/edits", form, "multipart/form-data; boundary=edit"),
        ]
    return jobs


BROKEN = json_job(
    "/generate", text="USER: <image>hi\nASSISTANT:", images=["iVBORw0KGgoAAAANSUhEUgAA"]
)


def read_answer(status: int, content: str) -> tuple[int, str]:
    """Status and content without what differs each time; a stream as the message that it makes."""
    if content.startswith("data: "):
        message: dict[str, Any] = {"content": "", "images": [], "boxes": [], "notes": []}
        if "data: [DONE]" not in content:
            return 0, "lost"
        for line in content.split("\n\n")[:-2]:
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return 503 if OUT_OF_MEMORY in line else 500, line
            for name, value in event["choices"][0]["delta"].items():
                message[name] = message.get(name, "") + value if name != "role" else value
            message["usage"] = event.get("usage")
        return status, json.dumps(message, sort_keys=True)
    try:
        body = json.loads(content)
    except ValueError:
        return status, content
    for name in ("id", "created"):
        body.pop(name, None)
    return status, json.dumps(body, sort_keys=True)


def compare(answer: str, expected: str) -> str:
    """`equal`, `equal to rounding` (of pixels) or `differs`."""
    if answer == expected:
        return "equal"
    if PNG.sub("", answer) != PNG.sub("", expected):
        return "differs"
    for file, expected_file in zip(PNG.findall(answer), PNG.findall(expected), strict=True):
        pixels, expected_pixels = (
            np.asarray(open_image(io.BytesIO(bytes_from_base64(text, "image"))), np.int16)
            for text in (file, expected_file)
        )
        if pixels.shape != expected_pixels.shape or abs(pixels - expected_pixels).max() > ROUNDING:
            return "differs"
    return "equal to rounding"
