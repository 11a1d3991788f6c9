"""The models that the chat page knows, and the client of their backends; without Gradio and torch."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.language import prompts as sentences
from seed_multimodal.lavit.ratios import RATIOS

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 600.0
Example = tuple[str, str]  # a text, and the name of a demo image or nothing


@dataclass(frozen=True)
class Kind:
    """The differences between models; `can`: tabs next to the chat; `whole`: images are sent as they are, not squashed;
    `around`: each message is read alone, between these two; `ratios`: shapes that it draws in, with its own settings
    rather than the sliders'."""

    title: str
    can: tuple[str, ...] = ("draw", "edit", "codes")
    temperature: float = 1.0
    examples: tuple[Example, ...] = tuple(zip(sentences.DEMO_QUESTIONS, ("cat.jpg", "", "cat.jpg"), strict=True))
    whole: bool = False
    around: tuple[str, str] | None = None
    rounds: int = 3
    ratios: tuple[str, ...] = ()


def _seed_x(title: str, can: tuple[str, ...], *examples: Example, **more: Any) -> Kind:
    described = (sentences.SEED_X_TASKS.describe, "fox_and_snowman.png")
    return Kind(title, can, 0.0, (described, *examples), whole=True, **more)


def _lavit(title: str, *examples: Example) -> Kind:
    return Kind(title, ("draw",), examples=examples, whole=True, around=("", ""), ratios=tuple(RATIOS))


_FIND = (sentences.SEED_X_TASKS.detect_request("the snowman"), "fox_and_snowman.png")
KINDS = {
    "nano": Kind("SEED nano", temperature=0.0, rounds=5, examples=(
        ("Please draw a noto dog left of a tree in a meadow.", ""), (sentences.DESCRIBE_PROMPT, "fox_and_snowman.png"),
        (f"What is on the left?{sentences.QA_SUFFIX}", "fox_and_snowman.png"), ("Put it at night.", "fox.png"))),
    "seed-llama-8b": Kind("SEED-LLaMA 8B"),
    "seed-llama-14b": Kind("SEED-LLaMA 14B"),
    "seed-x": _seed_x("SEED-X", (), ("What is this?", "cat.jpg"), around=("Question: ", "\nAnswer:")),
    "seed-x-i": _seed_x("SEED-X-I", ("draw", "find"), _FIND, ("Generate an image: a dog on the green grass", "")),
    "seed-x-edit": _seed_x("SEED-X-Edit", ("edit",), ("Make it under the sunset", "fox.png")),
    "nano-x": _seed_x("SEED nano-x", ("draw", "edit", "find"), _FIND,
                      ("Generate an image: a noto dog left of a tree", ""), ("Put it at night.", "fox.png")),
    "lavit": _lavit("LaVIT", ("What is in the picture?", "cat.jpg"), ("", "fox_and_snowman.png")),
    "nano-lavit": _lavit("SEED nano-lavit", ("What is the background?", "fox_and_snowman.png"), ("", "fox.png")),
}


def kind_of(model_type: str) -> Kind:
    """Look up a model type; raises `ConfigError` for an unknown one."""
    if model_type not in KINDS:
        raise ConfigError(f"Unknown model type {model_type!r}: use {', '.join(KINDS)}.")
    return KINDS[model_type]


@dataclass
class Model:
    """A backend (the address of its `/generate`), and what is known of its model."""

    address: str
    kind: Kind

    async def learn(self) -> None:
        """Ask the backend which model it has."""
        name = str((await self.fetch("/v1/models"))["data"][0]["id"]).rpartition("/")[2]
        self.kind = KINDS.get(name) or KINDS.get(f"seed-llama-{name}") or self.kind

    async def fetch(self, route: str, **body: Any) -> dict[str, Any]:
        """The one JSON object of a route, as `ask`."""
        return [piece async for piece in self.ask(route, **body)][0]

    async def ask(self, route: str, **body: Any) -> AsyncIterator[dict[str, Any]]:
        """The JSON of each event of a route; `body`: `json`, or `files` and `data`, as of httpx. Leaving it cancels the
        request.

        Raises:
            RequestError: no server, an error response, or another kind of server.
        """
        import httpx

        address = self.address.removesuffix("/generate").rstrip("/") + route
        token = os.environ.get("SEED_TOKEN", "").strip()  # of a server with a password
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        seconds = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        try:
            async with (httpx.AsyncClient(timeout=seconds, headers=headers) as client,
                        client.stream("POST" if body else "GET", address, **body) as response):
                async for line in response.aiter_lines():
                    if line and line != "data: [DONE]":
                        piece = json.loads(line.removeprefix("data: "))
                        if "error" in piece:
                            raise RequestError(piece["error"]["message"])
                        yield piece
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RequestError(f"No model answers at {address}: start the backend (bash scripts/start_backend_nano.sh) "
                               f"and try again.") from error
        except (ValueError, TypeError) as error:
            raise RequestError(f"{address} did not answer as a SEED backend does: is the address right?") from error
