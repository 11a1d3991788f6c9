"""ComfyUI nodes for SEED Multimodal's server: ask about images, draw, edit, chat.

Copy this file to `ComfyUI/custom_nodes/` and start a server (`bash scripts/start_backend.sh nano`).
The nodes use its OpenAI routes; they need nothing but ComfyUI's own torch, numpy and Pillow. The
server's token, if it has one, is read from the variable SEED_TOKEN, so that no workflow holds it.

Images are ComfyUI's: float tensors [batch, height, width, RGB] in 0 … 1. Large ones are reduced
before they are sent: no model reads more than LONGEST_SIDE.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import json
import math
import os
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any

import numpy as np
import torch
from PIL import Image

Json = dict[str, Any]
SECONDS = 700  # of an answer; the server's own limit is 600 by default
MAX_SEED = 2**31 - 1
LONGEST_SIDE = 1792  # of an image that is sent: four views of 448 pixels (SEED-X)
MAX_PIXELS = 16_000_000  # of a batch: in base64 at most 64 MiB, the server's limit of a request
NO_IMAGE = "The answer has no image: the output is black."
CATEGORY = "SEED Multimodal"

# Inputs that several nodes have.
SERVER = ("SEED_SERVER",)
IMAGE = ("IMAGE",)
SEED = ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True})
TEMPERATURE = ("FLOAT", {"default": 0.0, "min": 0.0, "max": 2.0, "step": 0.1})
MAX_TOKENS = ("INT", {"default": 256, "min": 1, "max": 4096})


def text_input(default: str) -> tuple[str, Json]:
    return ("STRING", {"default": default, "multiline": True})


# ---- images


def image_bytes(image: torch.Tensor, longest_side: int = LONGEST_SIDE) -> bytes:
    """An image [height, width, RGB] as a PNG file, reduced to `longest_side`."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    reduced = Image.fromarray(pixels[..., :3])
    reduced.thumbnail((longest_side, longest_side))
    buffer = io.BytesIO()
    reduced.save(buffer, format="PNG")
    return buffer.getvalue()


def data_urls(images: torch.Tensor) -> list[str]:
    """A batch as data URLs, reduced so that one request can hold them."""
    side_in_batch = math.isqrt(MAX_PIXELS // len(images))
    longest_side = min(LONGEST_SIDE, side_in_batch)
    urls = []
    for image in images:
        encoded = base64.b64encode(image_bytes(image, longest_side)).decode()
        urls.append(f"data:image/png;base64,{encoded}")
    return urls


def image_batch(images: list[str]) -> torch.Tensor:
    """Images in base64 → [batch, height, width, RGB]; a black one if there are none."""
    if not images:
        return torch.zeros(1, 64, 64, 3)
    arrays = []
    for image in images:
        content = base64.b64decode(image.rpartition("base64,")[2])
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        arrays.append(torch.from_numpy(pixels.astype(np.float32) / 255))
    return torch.stack(arrays)


# ---- the server


def direct(url: str) -> bool:
    """Whether no proxy leads to a server: as `seed_multimodal.proxies.direct`."""
    try:
        host = (urllib.parse.urlsplit(url).hostname or "").rstrip(".")
        is_name = "." not in host and ":" not in host
        if is_name or host.endswith((".localhost", ".local", ".internal")):
            return True
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def request_json(address: str, route: str, body: bytes, content_type: str) -> Json:
    """Post a request. Raises RuntimeError: the server's error as it is, or no server."""
    headers = {"Content-Type": content_type}
    token = os.environ.get("SEED_TOKEN", "").strip()
    if token:
        headers["Authorization"] = f"Bearer {token}"
    root = address.strip().rstrip("/").removesuffix("/generate").removesuffix("/v1")
    url = (root if "://" in root else f"http://{root}") + route
    try:
        request = urllib.request.Request(url, data=body, headers=headers)
        # Without a mapping the handler reads the environment's proxies.
        proxies = urllib.request.ProxyHandler({} if direct(url) else None)
        with urllib.request.build_opener(proxies).open(request, timeout=SECONDS) as response:
            answer: Json = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            sentence = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):  # another server, or a proxy
            sentence = text[:500] or str(error.reason)
        raise RuntimeError(f"{url} ({error.code}): {sentence}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ConnectionResetError | BrokenPipeError):
            raise RuntimeError(
                f"{url}: the server closed the connection, perhaps because the request is too "
                f"large ({len(body) / 2**20:.0f} MiB)."
            ) from error
        raise RuntimeError(f"{url}: no SEED server answers ({reason}).") from error


def post_json(address: str, route: str, body: Json) -> Json:
    return request_json(address, route, json.dumps(body).encode(), "application/json")


def post_form(address: str, route: str, fields: Json, image: bytes) -> Json:
    """Post fields and an image as multipart/form-data."""
    boundary = uuid.uuid4().hex
    body = b""
    for name, value in fields.items():
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        body += f"{head}{value}\r\n".encode()
    body += (
        f"--{boundary}\r\n"
        'Content-Disposition: form-data; name="image"; filename="image.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode()
    body += image + f"\r\n--{boundary}--\r\n".encode()
    return request_json(address, route, body, f"multipart/form-data; boundary={boundary}")


def user_message(text: str, images: torch.Tensor | None) -> Json:
    """A message with all images of a batch before its text."""
    parts: list[Json] = []
    if images is not None:
        for url in data_urls(images):
            parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def chat(address: str, messages: list[Json], **settings: object) -> Json:
    """The message that answers a conversation."""
    body = {"messages": messages, **settings}
    answer: Json = post_json(address, "/v1/chat/completions", body)["choices"][0]["message"]
    return answer


# ---- the nodes


class SeedServer:
    """The address of a server, for the other nodes."""

    CATEGORY = CATEGORY
    FUNCTION = "connect"
    RETURN_TYPES = ("SEED_SERVER",)
    RETURN_NAMES = ("server",)

    @classmethod
    def INPUT_TYPES(cls) -> Json:
        return {"required": {"address": ("STRING", {"default": "http://127.0.0.1:7890"})}}

    def connect(self, address: str) -> tuple[str]:
        return (address,)


class SeedAsk:
    """Describe images, or answer a question about them; the images of a batch are one question."""

    CATEGORY = CATEGORY
    FUNCTION = "ask"
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("answer", "notes")

    @classmethod
    def INPUT_TYPES(cls) -> Json:
        describe = "Please provide an accurate and concise description of the given image."
        inputs = {
            "server": SERVER,
            "images": IMAGE,
            "question": text_input(describe),
            "seed": SEED,
            "temperature": TEMPERATURE,
            "max_tokens": MAX_TOKENS,
        }
        return {"required": inputs}

    def ask(
        self,
        server: str,
        images: torch.Tensor,
        question: str,
        seed: int,
        temperature: float,
        max_tokens: int,
    ) -> tuple[str, str]:
        messages = [user_message(question, images)]
        answer = chat(server, messages, seed=seed, temperature=temperature, max_tokens=max_tokens)
        return answer["content"], "\n".join(answer["notes"])


class SeedDraw:
    """Draw images of a text."""

    CATEGORY = CATEGORY
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "notes")

    @classmethod
    def INPUT_TYPES(cls) -> Json:
        count = ("INT", {"default": 1, "min": 1, "max": 8})
        prompt = text_input("a noto dog left of a tree in a meadow")
        return {"required": {"server": SERVER, "prompt": prompt, "count": count, "seed": SEED}}

    def draw(self, server: str, prompt: str, count: int, seed: int) -> tuple[torch.Tensor, str]:
        body = {"prompt": prompt, "n": count, "seed": seed}
        answer = post_json(server, "/v1/images/generations", body)
        images = image_batch([image["b64_json"] for image in answer["data"]])
        return images, "\n".join(answer["notes"])


class SeedEdit:
    """Change each image of a batch as a text says."""

    CATEGORY = CATEGORY
    FUNCTION = "edit"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "notes")

    @classmethod
    def INPUT_TYPES(cls) -> Json:
        prompt = text_input("Put it at night.")
        return {"required": {"server": SERVER, "images": IMAGE, "prompt": prompt, "seed": SEED}}

    def edit(
        self, server: str, images: torch.Tensor, prompt: str, seed: int
    ) -> tuple[torch.Tensor, str]:
        edited: list[str] = []
        notes: list[str] = []
        fields = {"prompt": prompt, "seed": seed}
        for image in images:
            answer = post_form(server, "/v1/images/edits", fields, image_bytes(image))
            edited += [result["b64_json"] for result in answer["data"]]
            notes += [note for note in answer["notes"] if note not in notes]
        return image_batch(edited), "\n".join(notes)


class SeedChat:
    """One round of a conversation with images both ways; `history` is of the round before.

    The images of an answer without any are one black image, with a note.
    """

    CATEGORY = CATEGORY
    FUNCTION = "chat"
    RETURN_TYPES = ("STRING", "IMAGE", "SEED_HISTORY", "STRING")
    RETURN_NAMES = ("answer", "images", "history", "notes")

    @classmethod
    def INPUT_TYPES(cls) -> Json:
        inputs = {
            "server": SERVER,
            "message": text_input(""),
            "force_image": ("BOOLEAN", {"default": False}),
            "seed": SEED,
            "temperature": TEMPERATURE,
            "max_tokens": MAX_TOKENS,
        }
        return {"required": inputs, "optional": {"images": IMAGE, "history": ("SEED_HISTORY",)}}

    def chat(
        self,
        server: str,
        message: str,
        force_image: bool,
        seed: int,
        temperature: float,
        max_tokens: int,
        images: torch.Tensor | None = None,
        history: list[Json] | None = None,
    ) -> tuple[str, torch.Tensor, list[Json], str]:
        messages = [*(history or []), user_message(message, images)]
        answer = chat(
            server,
            messages,
            force_image=force_image,
            seed=seed,
            temperature=temperature,
            max_tokens=max_tokens,
        )
        drawn = image_batch([image["image_url"]["url"] for image in answer["images"]])
        notes = answer["notes"] if answer["images"] else [*answer["notes"], NO_IMAGE]
        return answer["content"], drawn, [*messages, answer], "\n".join(notes)


NODE_CLASS_MAPPINGS = {
    "SeedMultimodalServer": SeedServer,
    "SeedMultimodalAsk": SeedAsk,
    "SeedMultimodalDraw": SeedDraw,
    "SeedMultimodalEdit": SeedEdit,
    "SeedMultimodalChat": SeedChat,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SeedMultimodalServer": "SEED server",
    "SeedMultimodalAsk": "SEED describe / ask",
    "SeedMultimodalDraw": "SEED draw",
    "SeedMultimodalEdit": "SEED edit",
    "SeedMultimodalChat": "SEED chat",
}
