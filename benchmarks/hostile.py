"""Send the server generated hostile traffic; measure its effect on a visitor and the machine.

One JSON line.

    python benchmarks/hostile.py --examples 2000             10,000 requests and more

Clients send decompression bombs, damaged files and broken HTTP, leave, or stall with half a body;
then schemathesis makes requests out of the server's OpenAPI document, valid and not. Meanwhile a
visitor asks every 0.2 s. The exit code is 1 after an answer 5xx, a hang or a dead server.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from serving import Server
from shared import base_parser, print_line, rounded, start

from seed_multimodal.device import choose_device
from seed_multimodal.images.io import image_to_bytes

HANG_SECONDS = 60.0
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance"
)


def post(body: bytes) -> bytes:
    """An HTTP request."""
    return (
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )


def ask(text: Any = "USER: hi\nASSISTANT:", images: Any = (), **settings: Any) -> bytes:
    """A request as documented, whatever its values are."""
    return post(
        json.dumps({"text": text, "images": images, "max_new_tokens": 4, **settings}).encode()
    )


def show(*files: bytes) -> bytes:
    """A request with these image files."""
    return ask("<image>" * len(files), [base64.b64encode(file).decode() for file in files])


def odd_requests() -> Iterator[bytes]:
    """Large and deep bodies, and broken HTTP."""
    yield ask("<image>", ["A" * 29_000_000])
    for body in (
        b"[" * 100_000,
        b'["' + b'\\"' * 200_000,
        b'{"images": [[' + b"1," * 4_000_000 + b"1]]}",
        b" " * (66 << 20),
    ):
        yield post(body)
    chunked = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    yield chunked + (b"100000\r\n" + b"x" * 2**20 + b"\r\n") * 70 + b"0\r\n\r\n"
    yield chunked + b"zz\r\n{}\r\n0\r\n\r\n"


def hostile_files(rng: np.random.Generator, side: int) -> Iterator[bytes]:
    """Decompression bombs and damaged files; `side`: of a square just within the limit of
    pixels."""
    bomb = image_to_bytes(Image.new("1", (side, side)))  # 31 megapixels in 4 kB
    yield from [show(*[bomb] * 16), *[show(bomb)] * 8]
    yield from (
        show(image_to_bytes(Image.new(mode, (side, side)))) for mode in ("P", "RGBA", "RGBA")
    )
    noise = Image.fromarray(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)).resize(
        (side, side)
    )
    yield show(image_to_bytes(noise, "JPEG", quality=30, progressive=True))
    small = image_to_bytes(noise.resize((900, 900)), "JPEG", progressive=True)
    scan = small.rindex(b"\xff\xda")
    yield show(small[:scan] + small[scan:-2][:40] * 100_000)  # 100,000 scans
    for kind in ("GIF", "WEBP", "TIFF", "PNG", "JPEG"):
        content = bytearray(image_to_bytes(noise.resize((min(side, 1500),) * 2), kind))
        content[len(content) // 3] ^= 255
        yield from (show(bytes(content)), show(bytes(content[: len(content) // 2])))


class Traffic:
    """Requests to one server, and what came back: `faults` are 5xx and hangs, `visits` seconds."""

    def __init__(self, server: Server) -> None:
        self.connect = partial(
            socket.create_connection, ("127.0.0.1", server.port), timeout=HANG_SECONDS
        )
        self.server = server
        self.statuses = collections.Counter[str]()
        self.done = threading.Event()
        self.faults = list[str]()
        self.visits = list[float]()

    def send(self, request: bytes) -> None:
        """Count the status of the answer, `closed` or `hang`."""
        answer = b""
        status = "closed"
        try:
            with self.connect() as sock:
                # It may have been answered before its end.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    sock.sendall(request)
                while len(answer) < 12 and (piece := sock.recv(1 << 16)):
                    answer += piece
        except TimeoutError:
            status = "hang"
        except OSError:  # reset by the server
            status = "closed"
        if code := re.match(rb"HTTP/1\.[01] (\d{3})", answer):
            status = code[1].decode()
        self.statuses[status] += 1
        if status == "hang" or status.startswith("5"):
            self.faults.append(f"{status}: {request[:300]!r}")

    def visit(self) -> None:
        """The visitor: a short question every 0.2 s."""
        while not self.done.wait(0.2):
            begin = time.monotonic()
            self.send(ask())
            self.visits.append(time.monotonic() - begin)

    def fuzz(self, examples: int) -> None:
        """So many requests of each route, by schemathesis."""
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "schemathesis.cli",
                "run",
                f"http://127.0.0.1:{self.server.port}/openapi.json",
                "--phases",
                "fuzzing" if examples < 20 else "coverage,fuzzing",
                "--max-examples",
                str(examples),
                "--checks",
                CHECKS,
                "--request-timeout",
                str(HANG_SECONDS),
                "--seed",
                "0",
                "--continue-on-failure",
                "--no-color",
            ],
            capture_output=True,
            text=True,
        )
        count = re.search(r"([\d,]+) generated", done.stdout)
        self.statuses["schemathesis"] += int(count[1].replace(",", "")) if count else 0
        if done.returncode:
            self.faults.append(done.stdout[-20_000:] + done.stderr[-2000:])


def run(options: argparse.Namespace) -> int:
    runtime = choose_device(options.device, options.dtype, log=None)
    rng = np.random.default_rng(0)
    cases = [*odd_requests(), *hostile_files(rng, int((options.megapixels * 0.98e6) ** 0.5))]
    flags = ("--max_megapixels", str(options.megapixels), "--max_seconds", "5")
    with Server(options.model, str(runtime.device), options.dtype, *flags) as server:
        traffic = Traffic(server)
        traffic.send(ask(force_boi=True, max_new_tokens=40))
        idle = server.memory_mb()
        Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak counts from here
        with ThreadPoolExecutor(10) as pool:
            pool.submit(traffic.visit)
            try:
                long = ask(max_new_tokens=2048, num_beams=8, temperature=5.0, top_p=1.0)
                stalled = [traffic.connect() for _ in range(200)]
                for row, sock in enumerate(stalled):
                    sock.sendall(long[:-20] if row % 10 else long)
                del stalled[::10]  # these leave
                list(
                    pool.map(lambda index: traffic.send(cases[index]), rng.permutation(len(cases)))
                )
                traffic.fuzz(options.examples)
            finally:
                traffic.done.set()
        peak = server.memory_mb("VmHWM")
        traffic.send(ask())
    if server.process.returncode:
        traffic.faults.append(f"exit code {server.process.returncode}")
    print_line(
        "hostile",
        options,
        runtime,
        {"examples": options.examples, "megapixels": options.megapixels},
        {
            "requests": sum(traffic.statuses.values()),
            "by_status": dict(traffic.statuses),
            "faults": traffic.faults,
            "idle_mb": round(idle),
            "peak_mb_above_idle": round(peak - idle),
            "longest_visit_seconds": rounded(max(traffic.visits)),
        },
    )
    return int(bool(traffic.faults))


if __name__ == "__main__":
    parser = base_parser(__doc__)
    parser.add_argument(
        "--examples", type=int, default=20, help="of each route by schemathesis; 20: also at limits"
    )
    parser.add_argument(
        "--megapixels", type=int, default=32, help="--max_megapixels, and the size of the bombs"
    )
    start(run, parser)
