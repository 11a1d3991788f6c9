"""Connections of the server: bodies and answers stay in memory, without temporary files, and a
client may close its own half of a connection.
"""

from __future__ import annotations

import socket
from io import BytesIO
from typing import Any

from flask import Request
from waitress.buffers import BytesIOBasedBuffer, ReadOnlyFileBasedBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser

LARGE_ANSWER_BYTES = 1 << 16
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # which clients skip before an answer


class FormRequest(Request):
    """A request whose form's files are in memory."""

    def _get_file_stream(self, *_args: object, **_options: object) -> BytesIO:
        return BytesIO()


class DroppedBody(BytesIO):
    """A body for which memory was short."""

    def write(self, data: Any) -> int:
        return len(data)

    def read(self, _size: int | None = -1) -> bytes:
        raise MemoryError

    readinto = read  # type: ignore[assignment]


class Body(BytesIOBasedBuffer):
    """The body of a request. Reading one for which memory is short raises MemoryError."""

    def append(self, data: bytes) -> None:
        try:
            super().append(data)
        except MemoryError:
            self.file = DroppedBody()  # the rest is received, too: the client gets an answer


class RequestParser(HTTPRequestParser):
    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        if self.body_rcv is not None:
            self.body_rcv.buf = Body()


class Connection(HTTPChannel):
    """A client that has sent its request and closed its half gets the answer.

    One that has closed the whole connection looks the same, until something is sent to it: then it
    answers with a reset. While a stream is read, both end it.
    """

    parser_class = RequestParser
    is_half_closed = False
    # Of the current answer.
    has_begun = False
    is_stream = False

    def readable(self) -> bool:
        return super().readable() and not (self.is_half_closed and self.requests)

    def handle_read(self) -> None:
        if self.requests and self.requests[0].version == "1.1" and not self.is_stream:
            try:
                if not self.socket.recv(1, socket.MSG_PEEK):
                    self.is_half_closed = True
                    with self.outbuf_lock:
                        if not self.has_begun and not self.total_outbufs_len:
                            self.socket.send(CONTINUE)
                    return
            except OSError:  # a reset
                pass
        super().handle_read()

    def check_client_disconnected(self) -> bool:
        """Whether the client has left."""
        if self.is_half_closed:
            try:
                self.socket.getpeername()
            except OSError:  # the connection was reset
                return True
        return not self.connected

    def service(self) -> None:
        self.has_begun = self.is_stream = False
        super().service()

    def write_soon(self, data: Any) -> int:
        with self.outbuf_lock:
            if not self.has_begun:  # these are the headers
                self.has_begun = True
                self.is_stream = b"\r\nTransfer-Encoding: chunked" in data
        # A large answer is sent as it is, not copied.
        if isinstance(data, bytes) and len(data) > LARGE_ANSWER_BYTES:
            data = ReadOnlyFileBasedBuffer(BytesIO(data))
            data.prepare()
        return super().write_soon(data)

    def send_continue(self) -> None:
        # A request that is too large is refused before its body is sent.
        if not self.request.error:
            super().send_continue()
