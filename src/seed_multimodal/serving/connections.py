"""Connections of the server: bodies and answers stay in memory, without temporary files, a client
may close its own half of a connection, and slow clients do not keep others out.
"""

from __future__ import annotations

import time
from io import BytesIO
from typing import Any

from waitress.buffers import BytesIOBasedBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser

MIN_RATE = 4096  # bytes a second of a request that arrives
MAX_INCOMPLETE = 128  # connections of an address without a complete request
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # which clients skip before an answer


class DroppedBody(BytesIO):
    """The body of a request for which memory is short. Reading it raises MemoryError."""

    def write(self, data: Any) -> int:
        return len(data)

    def readinto(self, buffer: Any) -> int:
        raise MemoryError


class Body(BytesIOBasedBuffer):
    """The body of a request in memory."""

    def append(self, data: bytes) -> None:
        try:
            super().append(data)
        except MemoryError:
            self.file = DroppedBody()  # the rest is received, too: the client gets an answer


class RequestParser(HTTPRequestParser):
    path = ""  # of a header that cannot be read

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        if self.body_rcv is not None:
            self.body_rcv.buf = Body()


class Connection(HTTPChannel):
    """A client that has sent its request and closed its half gets the answer.

    One that has closed the whole connection looks the same, until something is sent to it: then it
    answers with a reset, also to the next text of a stream.
    """

    parser_class = RequestParser
    last_activity: float
    is_half_closed = False
    is_probed = False
    is_stream = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # The slowest client of an address makes room for its next one. Requests that are complete
        # are not counted: behind a proxy all have its address.
        incomplete = [
            channel
            for channel in self.server.active_channels.values()
            if channel.addr[0] == self.addr[0] and channel.readable() and not channel.requests
        ]
        if len(incomplete) > MAX_INCOMPLETE:
            min(incomplete, key=lambda channel: channel.last_activity).handle_close()

    def readable(self) -> bool:
        return super().readable() and not (self.is_half_closed and self.requests)

    def handle_read(self) -> None:
        try:
            data = self.socket.recv(self.adj.recv_bytes)
        except OSError:  # a reset
            self.handle_close()
            return
        if data:
            # The server closes connections some seconds after their last activity. Each byte
            # moves it a little: so there is a deadline for a whole header and a whole body.
            self.last_activity = min(time.time(), self.last_activity + len(data) / MIN_RATE)
            self.received(data)
        elif self.requests:
            self.is_half_closed = True
        else:
            self.handle_close()

    def check_client_disconnected(self) -> bool:
        """Whether the client has left, while its answer is made."""
        try:
            if self.is_half_closed:
                with self.outbuf_lock:
                    # Clients of HTTP/1.0 do not skip it.
                    if self.requests[0].version == "1.1" and not (self.is_stream or self.is_probed):
                        self.is_probed = bool(self.socket.send(CONTINUE))
                self.socket.getpeername()
        except (AttributeError, OSError):  # the connection was reset, or has no socket any more
            return True
        return not self.connected

    def write_soon(self, data: Any) -> int:
        with self.outbuf_lock:
            if data.startswith(b"HTTP/"):
                self.is_stream = b"\r\nTransfer-Encoding: chunked" in data
        n_bytes: int = super().write_soon(data)
        return n_bytes

    def send_continue(self) -> None:
        # A request that is too large is refused before its body is sent.
        if not self.request.error:
            super().send_continue()
