"""waitress in front of the Flask application: buffers requests, keeps threads for answers, and gives nobody for ever.

One thread reads all connections; a request takes a worker only when its body is whole (in memory up to 64 KiB, then in
a temporary file). What waitress lacks is added by a channel of our own:

* A connection that has sent no whole header after `PATIENCE` seconds, sends a body at less than `SLOWEST` bytes a
  second, does not read its answer or sits idle is closed; waitress itself counts any single byte as activity.
* A body over the limit, chunked or not, is read on without being kept, so that the client sees the 413 instead of a
  broken connection; past `SWALLOWED` bytes it is cut.
* What waitress refuses by itself is JSON with one sentence, as our own refusals are.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import waitress
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.receiver import ChunkedReceiver
from waitress.task import ErrorTask
from waitress.utilities import BadRequest, RequestEntityTooLarge

if TYPE_CHECKING:
    from flask import Flask

PATIENCE = 20.0  # seconds
SLOWEST = 16 << 10  # bytes a second
SWALLOWED = 256 << 20  # bytes
CONNECTIONS = 512
HEADER_BYTES = 16 << 10  # of a request's header, and of a line between chunks
_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of malloc.h
PIECE = 8 << 10  # bytes read at once: thousands of tiny requests or chunks in larger ones would hold up everybody
SPARE_THREADS = 8  # for refusals and /health, beside one for each request that waits


class Discarded:
    """A body's buffer that keeps nothing but its length."""

    def __init__(self) -> None:
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def append(self, data: bytes) -> None:
        self.length += len(data)

    def close(self) -> None:
        """Nothing is held."""


class Parser(HTTPRequestParser):  # type: ignore[misc]  # waitress has no types
    """Knows since when it reads its request, and reads bodies that are too long to their end."""

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.started = time.monotonic()

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # a length of over 4300 digits, an address with half an IPv6 one
            raise ParsingError(str(error)) from error

    def received(self, data: bytes) -> int:
        consumed: int = super().received(data)
        body = self.body_rcv
        if isinstance(body, ChunkedReceiver) and len(body.control_line) + len(body.trailer) > HEADER_BYTES:
            # waitress would copy such a line whole at each piece, and answer nobody meanwhile
            self.error, self.completed = BadRequest("a line between chunks is too long"), True
            body.control_line = body.trailer = b""
        if not isinstance(self.error, RequestEntityTooLarge) or body is None:
            return consumed
        if getattr(self, "expect_continue", False) or self.content_length > SWALLOWED:
            self.expect_continue = False  # it waits for leave to send: the refusal is enough
            return consumed
        if not isinstance(body.buf, Discarded):
            body.buf.close()
            body.buf = Discarded()
        self.completed = bool(body.completed or body.error or self.body_bytes_received > SWALLOWED)
        return consumed

    def late(self, patience: float) -> bool:
        """Whether the request should have come by now."""
        return time.monotonic() - self.started > patience + self.body_bytes_received / SLOWEST


class Refusal(ErrorTask):  # type: ignore[misc]
    """A refusal by waitress as ours look."""

    def execute(self) -> None:
        error = self.request.error
        body = json.dumps(self.channel.server.refusal(error.code)).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection that is closed when it holds its place for nothing."""

    parser_class = Parser
    error_task_class = Refusal

    def readable(self) -> bool:
        """Asked by waitress once a second and whenever something happens."""
        if not self.requests and self._wastes():
            self.will_close = True
        return bool(super().readable())

    def _wastes(self) -> bool:
        patience = PATIENCE / 10 if self.server.in_connection_overflow else PATIENCE
        if self.request is not None:
            return bool(self.request.late(patience))
        return time.time() - self.last_activity > patience  # idle, or not reading its answer


def make_server(app: Flask, sock: socket.socket, *, workers: int, max_body_bytes: int,
                refusal: Callable[[int], dict[str, Any]]) -> Any:
    """A waitress server on a bound socket.

    Args:
        workers: requests that may wait or be answered at once.
        refusal: status -> the JSON of what waitress refuses by itself.
    """
    server = waitress.create_server(
        app, sockets=[sock], threads=workers + SPARE_THREADS, connection_limit=_connections(), asyncore_use_poll=True,
        channel_request_lookahead=1,  # reads on while a request is answered: that is how a client's end is noticed
        recv_bytes=PIECE, inbuf_overflow=1 << 16, outbuf_overflow=1 << 16, max_request_header_size=HEADER_BYTES,
        max_request_body_size=max_body_bytes + 1, log_socket_errors=False, ident="SEED Multimodal")
    server.channel_class, server.refusal = Channel, refusal
    for name in ("waitress", "waitress.queue"):  # lost connections and full lines are no news
        logging.getLogger(name).setLevel(logging.ERROR)
    return server


def _connections() -> int:
    """Connections that the limit of open files allows: each may hold a socket and a file."""
    try:
        import resource
    except ImportError:  # Windows
        return CONNECTIONS
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(CONNECTIONS, (soft - 128) // 2))


def return_freed_memory() -> None:
    """Have the C library give large blocks back to the system when they are freed (glibc).

    It learns otherwise from the first picture to keep blocks of up to 32 MiB, in a heap for each thread: after some
    large pictures hundreds of MB.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 1 << 20)
        library.mallopt(_ARENA_MAX, 2)


def listen_on_file(path: str) -> socket.socket:
    """A socket file, in place of one that an earlier server left."""
    sock = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(FileNotFoundError):
        if Path(path).is_socket():
            os.unlink(path)
    sock.bind(path)
    return sock
