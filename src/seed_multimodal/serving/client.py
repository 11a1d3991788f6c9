"""Client of a backend, for the chat page; without Gradio and torch."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import RequestError
from seed_multimodal.models.registry import ModelCard, find_family, model_cards

SECONDS = 600  # of an answer, as the server's limit
SECONDS_TO_CONNECT = 5


@dataclass
class ModelClient:
    """Client of a backend.

    Attributes:
        address: of its `/generate`.
        card: of its model; a guess until `load_card`.
        codes_per_image: of its model; 0: images have no codes.
        name: of its model, as the backend has it.
    """

    address: str
    card: ModelCard
    codes_per_image: int = 0
    name: str = ""

    async def load_card(self) -> None:
        """Set the card of the model that the backend serves."""
        models = await anext(self.stream("/v1/models"))
        model = models["data"][0]
        self.name = str(model["id"])
        # A folder of SEED-LLaMA may be named by its size only.
        cards = model_cards()
        card = cards.get(self.name) or cards.get(f"seed-llama-{self.name}")
        if card is None and "family" in model:
            card = find_family(model["family"]).page_card()
        self.card = card or self.card
        self.codes_per_image = model.get("codes_per_image", 0)

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
