"""The chat page's models, and the client of their backends; without Gradio and torch."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import RequestError
from seed_multimodal.language import prompts as sentences
from seed_multimodal.models.lavit.ratios import RATIOS

# Texts with the name of a demo image each, "" for none.
Examples = tuple[tuple[str, str], ...]

SECONDS = 600  # of an answer, as the server's limit
SECONDS_TO_CONNECT = 5


@dataclass(frozen=True)
class ModelCard:
    """How the page differs between models.

    Attributes:
        tabs: further tabs, of "draw", "edit", "codes" and "find".
        temperature, max_rounds: initial values of the sliders.
        keeps_aspect: images are sent with their aspect ratio; otherwise as squares.
        single_turn_template: each message is sent alone, between these two texts.
        ratios: aspect ratios of its drawings. Such a model uses its own settings, not the sliders'.
    """

    title: str
    tabs: tuple[str, ...] = ("draw", "edit", "codes")
    temperature: float = 1.0
    examples: Examples = tuple(
        zip(sentences.DEMO_QUESTIONS, ("cat.jpg", "", "cat.jpg"), strict=True)
    )
    keeps_aspect: bool = False
    single_turn_template: tuple[str, str] | None = None
    max_rounds: int = 3
    ratios: tuple[str, ...] = ()


_SNOWMAN = "fox_and_snowman.png"
_FIND = (sentences.SEED_X_TASKS.detect_request("the snowman"), _SNOWMAN)
_DESCRIBE = (sentences.SEED_X_TASKS.describe, _SNOWMAN)
_NANO = ModelCard(
    "SEED nano",
    temperature=0.0,
    max_rounds=5,
    examples=(
        ("Please draw a noto dog left of a tree in a meadow.", ""),
        (sentences.DESCRIBE_PROMPT, _SNOWMAN),
        (f"What is on the left?{sentences.QA_SUFFIX}", _SNOWMAN),
        ("Put it at night.", "fox.png"),
    ),
)
_SEED_X = ModelCard(
    "SEED-X",
    tabs=(),
    temperature=0.0,
    examples=(_DESCRIBE, ("What is this?", "cat.jpg")),
    keeps_aspect=True,
    single_turn_template=("Question: ", "\nAnswer:"),
)
_SEED_X_I = replace(
    _SEED_X,
    title="SEED-X-I",
    tabs=("draw", "find"),
    examples=(_DESCRIBE, _FIND, ("Generate an image: a dog on the green grass", "")),
    single_turn_template=None,
)
_LAVIT = ModelCard(
    "LaVIT",
    tabs=("draw",),
    examples=(("What is in the picture?", "cat.jpg"), ("", _SNOWMAN)),
    keeps_aspect=True,
    single_turn_template=("", ""),
    ratios=tuple(RATIOS),
)
MODEL_CARDS = {
    "nano": _NANO,
    "seed-llama-8b": ModelCard("SEED-LLaMA 8B"),
    "seed-llama-14b": ModelCard("SEED-LLaMA 14B"),
    "seed-x": _SEED_X,
    "seed-x-i": _SEED_X_I,
    "seed-x-edit": replace(
        _SEED_X_I,
        title="SEED-X-Edit",
        tabs=("edit",),
        examples=(_DESCRIBE, ("Make it under the sunset", "fox.png")),
    ),
    "nano-x": replace(
        _SEED_X_I,
        title="SEED nano-x",
        tabs=("draw", "edit", "find"),
        examples=(
            _DESCRIBE,
            _FIND,
            ("Generate an image: a noto dog left of a tree", ""),
            ("Put it at night.", "fox.png"),
        ),
    ),
    "lavit": _LAVIT,
    "nano-lavit": replace(
        _LAVIT,
        title="SEED nano-lavit",
        examples=(("What is the background?", _SNOWMAN), ("", "fox.png")),
    ),
}


@dataclass
class ModelClient:
    """Client of a backend.

    Attributes:
        address: of its `/generate`.
        card: of its model; a guess until `load_card`.
    """

    address: str
    card: ModelCard

    async def load_card(self) -> None:
        """Set the card of the model that the backend serves."""
        models = await anext(self.stream("/v1/models"))
        name = str(models["data"][0]["id"])
        # A folder of SEED-LLaMA may be named by its size only.
        self.card = MODEL_CARDS.get(name) or MODEL_CARDS.get(f"seed-llama-{name}") or self.card

    async def stream(
        self,
        route: str,
        body: Mapping[str, object] | None = None,
        *,
        files: Mapping[str, bytes] | None = None,
        fields: Mapping[str, object] | None = None,
    ) -> AsyncIterator[JsonObject]:
        """The JSON of each event of a route. Leaving the loop cancels the request.

        body: JSON to post.
        files, fields: a form to post. Without body and files the route is read (GET).

        Raises:
            RequestError: no server, an error response, or another kind of server.
        """
        import httpx

        # 1. The request.
        address = self.address.removesuffix("/generate").rstrip("/") + route
        method = "GET" if body is None and files is None else "POST"
        headers = {}
        token = os.environ.get("SEED_TOKEN", "").strip()  # of a server with a password
        if token:
            headers["Authorization"] = f"Bearer {token}"
        # 2. Its events: lines of a stream, or one line of JSON.
        timeout = httpx.Timeout(SECONDS, connect=SECONDS_TO_CONNECT)
        try:
            async with (
                httpx.AsyncClient(timeout=timeout, headers=headers) as client,
                client.stream(method, address, json=body, files=files, data=fields) as response,
            ):
                async for line in response.aiter_lines():
                    if not line or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RequestError(event["error"]["message"])
                    yield event
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RequestError(
                f"No model answers at {address}: start the backend "
                f"(bash scripts/start_backend_nano.sh) and try again."
            ) from error
        except (ValueError, TypeError) as error:
            raise RequestError(
                f"{address} did not answer as a SEED backend does: is the address right?"
            ) from error
