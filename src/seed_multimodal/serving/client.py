"""The models that the chat page knows, and the client of their backends; without Gradio and torch."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from seed_multimodal.errors import RequestError
from seed_multimodal.language import prompts as sentences
from seed_multimodal.lavit.ratios import RATIOS

Examples = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ModelCard:
    """The differences between models; `can`: tabs next to the chat; `examples`: texts and names of demo images;
    `whole`: images are sent as they are, not squashed; `around`: each message is read alone, between these two;
    `ratios`: shapes that it draws in, with its own settings rather than the sliders'."""

    title: str
    tabs: tuple[str, ...] = ("draw", "edit", "codes")
    temperature: float = 1.0
    examples: Examples = tuple(
        zip(sentences.DEMO_QUESTIONS, ("cat.jpg", "", "cat.jpg"), strict=True)
    )
    keeps_aspect: bool = False
    single_turn_template: tuple[str, str] | None = None
    rounds: int = 3
    ratios: tuple[str, ...] = ()


_SNOWMAN = "fox_and_snowman.png"
_FIND = (sentences.SEED_X_TASKS.detect_request("the snowman"), _SNOWMAN)
_DESCRIBE = (sentences.SEED_X_TASKS.describe, _SNOWMAN)
_SEED_X: dict[str, Any] = {"temperature": 0.0, "keeps_aspect": True}
_LAVIT: dict[str, Any] = {
    "tabs": ("draw",),
    "keeps_aspect": True,
    "single_turn_template": ("", ""),
    "ratios": tuple(RATIOS),
}
MODEL_CARDS = {
    "nano": ModelCard(
        "SEED nano",
        temperature=0.0,
        rounds=5,
        examples=(
            ("Please draw a noto dog left of a tree in a meadow.", ""),
            (sentences.DESCRIBE_PROMPT, _SNOWMAN),
            (f"What is on the left?{sentences.QA_SUFFIX}", _SNOWMAN),
            ("Put it at night.", "fox.png"),
        ),
    ),
    "seed-llama-8b": ModelCard("SEED-LLaMA 8B"),
    "seed-llama-14b": ModelCard("SEED-LLaMA 14B"),
    "seed-x": ModelCard(
        "SEED-X",
        (),
        examples=(_DESCRIBE, ("What is this?", "cat.jpg")),
        single_turn_template=("Question: ", "\nAnswer:"),
        **_SEED_X,
    ),
    "seed-x-i": ModelCard(
        "SEED-X-I",
        ("draw", "find"),
        examples=(_DESCRIBE, _FIND, ("Generate an image: a dog on the green grass", "")),
        **_SEED_X,
    ),
    "seed-x-edit": ModelCard(
        "SEED-X-Edit",
        ("edit",),
        examples=(_DESCRIBE, ("Make it under the sunset", "fox.png")),
        **_SEED_X,
    ),
    "nano-x": ModelCard(
        "SEED nano-x",
        ("draw", "edit", "find"),
        examples=(
            _DESCRIBE,
            _FIND,
            ("Generate an image: a noto dog left of a tree", ""),
            ("Put it at night.", "fox.png"),
        ),
        **_SEED_X,
    ),
    "lavit": ModelCard(
        "LaVIT", examples=(("What is in the picture?", "cat.jpg"), ("", _SNOWMAN)), **_LAVIT
    ),
    "nano-lavit": ModelCard(
        "SEED nano-lavit",
        examples=(("What is the background?", _SNOWMAN), ("", "fox.png")),
        **_LAVIT,
    ),
}


@dataclass
class ModelClient:
    """A backend (the address of its `/generate`), and what is known of its model."""

    address: str
    card: ModelCard

    async def load_card(self) -> None:
        """Ask the backend which model it has."""
        name = str((await anext(self.stream("/v1/models")))["data"][0]["id"])
        self.card = MODEL_CARDS.get(name) or MODEL_CARDS.get(f"seed-llama-{name}") or self.card

    async def stream(self, route: str, **body: Any) -> AsyncIterator[dict[str, Any]]:
        """The JSON of each event of a route; `body`: `json`, or `files` and `data`, as of httpx. Leaving it cancels the
        request. Raises RequestError: no server, an error response, or another kind of server."""
        import httpx

        address = self.address.removesuffix("/generate").rstrip("/") + route
        token = os.environ.get("SEED_TOKEN", "").strip()  # of a server with a password
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            async with (
                httpx.AsyncClient(timeout=httpx.Timeout(600, connect=5), headers=headers) as client,
                client.stream("POST" if body else "GET", address, **body) as response,
            ):
                async for line in response.aiter_lines():
                    if line and line != "data: [DONE]":
                        piece = json.loads(line.removeprefix("data: "))
                        if "error" in piece:
                            raise RequestError(piece["error"]["message"])
                        yield piece
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RequestError(
                f"No model answers at {address}: start the backend (bash scripts/start_backend_nano.sh) "
                f"and try again."
            ) from error
        except (ValueError, TypeError) as error:
            raise RequestError(
                f"{address} did not answer as a SEED backend does: is the address right?"
            ) from error
