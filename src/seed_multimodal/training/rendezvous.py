"""The nodes of a run find each other at MASTER_ADDR and MASTER_PORT before torch's rendezvous.

torch waits 15 minutes without a word, and cannot say who is missing or that another program has the
port.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

from seed_multimodal.entry import log_line
from seed_multimodal.errors import ConfigError

MINUTES = "SEED_RDZV_MINUTES"  # environment variable: how long nodes wait for each other
NOTICE_SECONDS = 20.0
ANSWER_SECONDS = 5.0  # node 0 answers at once


class Waiting:
    """The time in which all nodes must have come.

    Raises ConfigError: `SEED_RDZV_MINUTES` is no number above 0.
    """

    def __init__(self, node: int, nodes: int, address: str, port: int) -> None:
        text = os.environ.get(MINUTES, "1")
        try:
            self.seconds = 60 * float(text)
        except ValueError:
            self.seconds = 0.0
        if not 0 < self.seconds < 1e6:
            raise ConfigError(f"{MINUTES} must be a number of minutes above 0, not {text!r}.")
        self.name = f"node {node} of {nodes} ({socket.gethostname()})"
        self.target = f"{address}:{port}"
        self.start = time.monotonic()
        self.logged = False

    def check(self, missing: str) -> None:
        """Log once who is missing. Raises ConfigError: the time is over."""
        elapsed = time.monotonic() - self.start
        limit = f"{self.seconds:.0f} s ({MINUTES})"
        if elapsed >= self.seconds:
            raise ConfigError(
                f"{self.name}: {missing} did not come to {self.target} within {limit}. Start every "
                "node with the same NNODES, MASTER_ADDR and MASTER_PORT and its own NODE_RANK; a "
                "firewall must let this port through."
            )
        if not self.logged and elapsed >= min(NOTICE_SECONDS, self.seconds / 3):
            self.logged = True
            log_line(f"torchrun: {self.name} waits for {missing} at {self.target}, {limit} in all.")


@contextlib.contextmanager
def meeting(address: str, port: int, node: int, nodes: int) -> Iterator[float]:
    """Wait for all nodes; yields the seconds that they may wait. Node 0 lets the others go on at
    the end of the block.

    Raises ConfigError: a node does not come, MASTER_ADDR is unknown, or another program has the
    port.
    """
    waiting = Waiting(node, nodes, address, port)
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise ConfigError(
            f"{waiting.name}: MASTER_ADDR {address} is not known to this machine "
            f"({error.strerror})."
        ) from None
    with contextlib.ExitStack() as stack:
        if node != 0:
            _join(waiting, stack, address, port, f"{node} {nodes}\n")
            yield waiting.seconds
            return
        connections = _gather(waiting, stack, port, nodes)
        yield waiting.seconds
        for connection in connections.values():
            with contextlib.suppress(OSError):  # that node has ended; its absence is an error later
                connection.sendall(b"start\n")


def _gather(
    waiting: Waiting, stack: contextlib.ExitStack, port: int, nodes: int
) -> dict[int, socket.socket]:
    """Node 0: the connections of all other nodes."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(
            f"{waiting.name}: port {port} cannot be opened ({os.strerror(error.errno or 0)}): "
            "another run or program uses it; set MASTER_PORT to a free one on all nodes."
        ) from None
    connections: dict[int, socket.socket] = {}
    with server:
        server.settimeout(0.5)
        while len(connections) < nodes - 1:
            absent = [str(other) for other in range(1, nodes) if other not in connections]
            waiting.check(f"{'node' if len(absent) == 1 else 'nodes'} {', '.join(absent)}")
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                other = _greeted_node(stack.enter_context(connection), nodes)
                if other:
                    connections[other] = connection
    return connections


def _greeted_node(connection: socket.socket, nodes: int) -> int:
    """The number of the node that has connected; 0: it belongs to no run, or to another one."""
    connection.settimeout(1.0)
    try:
        node, count = map(int, connection.recv(100).split())
        if count == nodes and 0 < node < nodes:
            connection.sendall(b"wait\n")
            return node
        connection.sendall(f"node 0 was started with NNODES={nodes}\n".encode())
    except (OSError, ValueError):  # a port scanner, or a node that has ended
        pass
    return 0


def _join(
    waiting: Waiting, stack: contextlib.ExitStack, address: str, port: int, greeting: str
) -> None:
    """Another node: wait for node 0, and until it has seen all nodes."""
    # 1. Connect, as soon as node 0 listens.
    connection: socket.socket | None = None
    while connection is None:
        waiting.check("node 0")
        with contextlib.suppress(OSError):
            connection = socket.create_connection((address, port), timeout=2.0)
        time.sleep(0.2)
    stack.enter_context(connection)

    # 2. Only node 0 understands the greeting, and answers at once.
    connection.settimeout(ANSWER_SECONDS)
    answer = ""
    with contextlib.suppress(OSError):
        connection.sendall(greeting.encode())
        answer = connection.recv(100).decode("utf-8", "replace").strip()
    if answer.startswith("node 0 "):
        raise ConfigError(f"{waiting.name}: {answer}; use the same on all nodes.")
    if not answer.startswith("wait"):
        raise ConfigError(
            f"{waiting.name}: what answers at {waiting.target} is not node 0 of this run; check "
            "MASTER_ADDR, and set MASTER_PORT to a port that is free there."
        )

    # 3. Node 0 knows how long to wait for the others.
    connection.settimeout(None)
    started = answer.endswith("start")
    with contextlib.suppress(ConnectionError):
        started = started or bool(connection.recv(100))
    if not started:
        raise ConfigError(
            f"{waiting.name}: node 0 at {waiting.target} ended before all nodes had come; its "
            "output says why."
        )
