"""Client of the backend, for a page that asks many things at once; a failure is one sentence."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from seed_multimodal.errors import RequestError, SeedError
from seed_multimodal.serving.dialogue import KINDS, Kind

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 600.0


@dataclass
class Model:
    """A backend (the address of its `/generate`), and what is known of its model."""

    address: str
    kind: Kind

    async def learn(self) -> str:
        """Ask the backend which model it has; returns a sentence if it does not answer."""
        try:
            async for answer in self.ask("/v1/models"):
                name = str(answer["data"][0]["id"]).rpartition("/")[2]
                self.kind = KINDS.get(name) or KINDS.get(f"seed-llama-{name}") or self.kind
        except SeedError as error:
            return str(error)
        return ""

    async def ask(self, route: str, **body: Any) -> AsyncIterator[dict[str, Any]]:
        """The JSON of a route, or of each event; `body`: `json`, or `files` and `data`, as of httpx. Leaving it cancels
        the request.

        Raises:
            RequestError: no server, timeout, an error response, or another kind of server.
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
                        yield _read(line.removeprefix("data: "), address)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise RequestError(f"{address!r} is no address; it looks like http://127.0.0.1:7890/generate.") from error
        except httpx.ReadTimeout as error:
            raise RequestError(f"The model at {address} did not answer within {ANSWER_SECONDS:g} seconds.") from error
        except httpx.HTTPError as error:
            raise RequestError(f"No model answers at {address}: start the backend (bash scripts/start_backend_nano.sh) "
                               f"and try again.") from error


def _read(line: str, address: str) -> dict[str, Any]:
    """One JSON object of an answer; raises `RequestError` for an error."""
    try:
        piece: dict[str, Any] = json.loads(line)
        if "error" not in piece:
            return piece
    except (ValueError, TypeError) as error:
        raise RequestError(f"{address} answered without JSON; is it the address of a SEED backend?") from error
    said = piece["error"]
    raise RequestError(str(said["message"] if isinstance(said, dict) else said))


async def together(streams: Sequence[AsyncIterator[Any]], running: set[asyncio.Task[None]]
                   ) -> AsyncIterator[tuple[int, Any]]:
    """Merge streams: (index, item or `SeedError`); cancelling the tasks in `running` ends them."""
    queue = asyncio.Queue[tuple[int, Any] | None]()

    async def read(number: int, stream: AsyncIterator[Any]) -> None:
        try:
            async for piece in stream:
                queue.put_nowait((number, piece))
        except SeedError as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(read(number, stream)) for number, stream in enumerate(streams)]
    running.update(tasks)
    asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (found := await queue.get()) is not None:
            yield found
    finally:
        for task in tasks:
            task.cancel()
        running.difference_update(tasks)
