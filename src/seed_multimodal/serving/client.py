"""Asynchronous client of the server."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seed_multimodal.errors import RequestError, SeedError

USER_AGENT = "SEED Multimodal client"
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 600.0


@dataclass
class Client:
    """A server; `address`: URL of its `/generate`."""

    address: str

    async def generate(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Stream the response of `POST /generate`: text and previews, and last the answer. Leaving it cancels the
        request.

        Raises:
            RequestError: no server, timeout, an error response, or another kind of server.
        """
        async for piece in self._ask("POST", self.address, json={**body, "previews": True, "words": True}):
            if not {"preview", "words", "text"} & set(piece):
                raise RequestError(f"{self.address} answered with something else than text and images; is it a SEED "
                                   f"backend?")
            yield piece

    async def ask(self, route: str, **body: Any) -> AsyncIterator[dict[str, Any]]:
        """The JSON of another route; `body`: `json`, or `files` and `data`, as of httpx. Raises as `generate`."""
        address = self.address.removesuffix("/generate").rstrip("/") + route
        async for piece in self._ask("POST" if body else "GET", address, **body):
            yield piece

    async def _ask(self, method: str, address: str, **body: Any) -> AsyncIterator[dict[str, Any]]:
        import httpx

        token = os.environ.get("SEED_TOKEN", "").strip()  # of a server with a password
        headers = {"User-Agent": USER_AGENT, **({"Authorization": f"Bearer {token}"} if token else {})}
        seconds = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        try:
            async with (httpx.AsyncClient(timeout=seconds, headers=headers) as client,
                        client.stream(method, address, **body) as response):
                async for line in response.aiter_lines():  # one per chunk
                    yield _piece(line, address, response.status_code)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise RequestError(f"{address!r} is no address; it looks like http://127.0.0.1:7890/generate.") from error
        except httpx.ReadTimeout as error:
            raise RequestError(f"The model at {address} did not answer within {ANSWER_SECONDS:g} seconds.") from error
        except httpx.HTTPError as error:
            raise RequestError(f"No model answers at {address}: start the backend (bash scripts/start_backend_nano.sh) "
                               f"and try again.") from error


def _piece(line: str, address: str, status: int) -> dict[str, Any]:
    """Parse a line of a response. Raises RequestError for an error."""
    try:
        piece = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{address} answered with status {status} and no JSON; is it the address of a SEED backend?"
                           ) from error
    said = piece.get("error") if isinstance(piece, dict) else None
    if said or status != 200 or not isinstance(piece, dict):
        said = said.get("message") if isinstance(said, dict) else said
        raise RequestError(str(said) if said else f"The backend refused the request (status {status}).")
    return piece


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
