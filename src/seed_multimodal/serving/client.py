"""Client of a backend, for the chat page; without Gradio and torch."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.request import getproxies

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import RequestError, first_line
from seed_multimodal.models.registry import Abilities, ModelCard, find_family, model_cards
from seed_multimodal.proxies import direct

SECONDS = 600  # of an answer, as the server's limit
SECONDS_TO_CONNECT = 5


@dataclass
class ModelClient:
    """Client of a backend.

    Attributes:
        address: of its `/generate`.
        card: of its model; a guess until `load_card`.
        abilities: of the model's family: one that writes no text has no use for the chat.
        codes_per_image: of its model; 0: images have no codes.
        name, notice, known: of its model, as the backend has them.
    """

    address: str
    card: ModelCard
    abilities: Abilities = Abilities()
    codes_per_image: int = 0
    name: str = ""
    notice: str = ""
    known: JsonObject = field(default_factory=dict)

    async def load_card(self) -> None:
        """Set the card of the model that the backend serves."""
        models: JsonObject = await self.post("/v1/models")
        if not models.get("data"):
            raise RequestError(f"{self.address} has no model: is the address right?")
        model = models["data"][0]
        self.name = str(model["id"])
        # A folder of SEED-LLaMA may be named by its size only.
        cards = model_cards()
        card = cards.get(self.name) or cards.get(f"seed-llama-{self.name}")
        if "family" in model:
            family = find_family(model["family"])
            self.abilities = family.config.abilities
            card = card or family.page_cards().family
        self.card = card or self.card
        self.codes_per_image = model.get("codes_per_image", 0)
        self.notice = model.get("notice", "")
        self.known = model.get("known") or {}

    async def post(self, route: str, **content: Any) -> JsonObject:
        """The JSON of a route; arguments and errors are those of `stream`."""
        return await anext(self.stream(route, **content), {})

    async def stream(self, route: str, **content: Any) -> AsyncIterator[JsonObject]:
        """The JSON of each event of a route. Leaving the loop cancels the request.

        content: what is posted, as of httpx: `json`, or the `files` and `data` of a form. Without
            it the route is read (GET).

        Raises:
            RequestError: no server, an error response, or another kind of server.
        """
        import httpx

        # 1. The request.
        address = self.address.removesuffix("/generate").rstrip("/") + route
        method = "POST" if content else "GET"
        headers: dict[bytes, bytes] = {}
        token = os.environ.get("SEED_TOKEN", "").strip()  # of a server with a password
        if token:
            headers[b"Authorization"] = f"Bearer {token}".encode()
        timeout = httpx.Timeout(SECONDS, connect=SECONDS_TO_CONNECT)
        is_direct = direct(address)
        try:
            client = httpx.AsyncClient(timeout=timeout, headers=headers, trust_env=not is_direct)
        except (ImportError, ValueError) as error:
            raise RequestError(
                f"{address}: the proxy of the environment cannot be used ({first_line(error)})."
            ) from error
        # 2. Its events: lines of a stream, or one line of JSON.
        status = 0
        try:
            async with client, client.stream(method, address, **content) as response:
                status = response.status_code
                async for line in response.aiter_lines():
                    if not line or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RequestError(event["error"]["message"])
                    response.raise_for_status()
                    yield event
                response.raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            by_proxy = "" if is_direct or not getproxies() else " by the environment's proxy"
            raise RequestError(
                f"No model answers at {address}{by_proxy} ({_reason(error)}): start the backend "
                f"(bash scripts/start_backend.sh nano) and try again."
            ) from error
        except (ValueError, TypeError) as error:
            raise RequestError(
                f"{address} did not answer as a SEED backend does (status {status}): is the "
                "address right?"
            ) from error


def _reason(error: BaseException) -> str:
    """The first cause of an error, such as "Connection refused"."""
    cause = error.__cause__ or error.__context__
    if isinstance(error, BaseExceptionGroup):  # of all addresses of a name
        cause = error.exceptions[0]
    if isinstance(cause, Exception):  # a time-out cancels its task, which is no cause
        return _reason(cause)
    code = error.errno if isinstance(error, OSError) else None
    return os.strerror(code) if code and code > 0 else first_line(error)
