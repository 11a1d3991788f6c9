"""Send the server generated hostile traffic; measure what a visitor and the machine notice. One JSON line.

    python benchmarks/hostile.py                             about 100 requests of each route
    python benchmarks/hostile.py --examples 2000             10,000 and more

schemathesis makes requests out of the server's OpenAPI document, valid and not. Beside it several connections send
decompression bombs, damaged files and broken HTTP; others leave, send half a body, or a byte now and then. A visitor
asks every 0.2 s (median and longest wait). The exit code is 1 after an answer 5xx, a hang or a dead server.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import io
import json
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from serving import Server
from shared import base_parser, print_line, rounded, start

from seed_multimodal.device import choose_device

HANG_SECONDS = 60.0
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def post(body: bytes, *headers: str) -> bytes:
    """An HTTP request."""
    lines = ["POST /generate HTTP/1.1", "Host: localhost", "Content-Type: application/json",
             f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def ask(text: Any = "USER: hi\nASSISTANT:", images: Any = (), **settings: Any) -> bytes:
    """A request as documented, whatever its values are."""
    return post(json.dumps({"text": text, "images": images, "max_new_tokens": 4, **settings}).encode())


def show(*files: bytes) -> bytes:
    """A request with these image files."""
    return ask("USER: " + "<image>" * len(files) + "What is it?\nASSISTANT:",
               [base64.b64encode(file).decode() for file in files])


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_requests(rng: np.random.Generator) -> Iterator[bytes]:
    """Large and deep bodies, and broken HTTP."""
    yield ask("<image>", ["A" * 29_000_000])
    for body in (b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'["' + b'\\"' * 200_000,
                 b'{"text": "x", "images": [[' + b"1," * 4_000_000 + b"1]]}"):
        yield post(body)
    chunked = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    yield chunked + (b"100000\r\n" + b"x" * 2**20 + b"\r\n") * 70 + b"0\r\n\r\n"
    yield chunked + b"zz\r\n{}\r\n0\r\n\r\n"
    yield post(b" " * (66 << 20))
    yield post(b"{}", "X-Long: " + "x" * 300_000)
    yield rng.bytes(3000).replace(b"\r\n", b"") + b"\r\n\r\n"


def hostile_files(rng: np.random.Generator, side: int) -> Iterator[bytes]:
    """Decompression bombs and damaged files; `side`: of a square just within the limit of pixels."""
    bomb = saved(Image.new("1", (side, side)))  # 31 megapixels in 4 kB
    yield show(*[bomb] * 16)
    yield from [show(bomb)] * 8
    yield show(saved(Image.new("1", (side, 3 * side))))
    yield from (show(saved(Image.new(mode, (side, side)))) for mode in ("L", "P", "RGBA", "RGBA"))
    noise = Image.fromarray(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)).resize((side, side))
    yield from (show(saved(noise, "JPEG", quality=30, progressive=progressive)) for progressive in (False, True))
    small = saved(noise.resize((900, 900)), "JPEG", progressive=True)
    scan = small.rindex(b"\xff\xda")
    yield show(small[:scan] + small[scan:-2][:40] * 100_000)  # 100,000 scans
    for kind in ("GIF", "WEBP", "TIFF", "PNG", "JPEG"):
        whole = bytearray(saved(noise.resize((min(side, 1500),) * 2), kind))
        yield show(bytes(whole))
        yield show(bytes(whole[:len(whole) // 2]))
        for place in rng.integers(0, len(whole), 20):
            whole[place] = rng.integers(256)
        yield show(bytes(whole))


class Traffic:
    """Requests to one server, and what came back."""

    def __init__(self, server: Server) -> None:
        self.server, self.statuses = server, collections.Counter[str]()
        self.faults: list[str] = []  # 5xx and hangs
        self.visits: list[float] = []  # seconds of the visitor's answers
        self.done = threading.Event()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=HANG_SECONDS)

    def send(self, request: bytes) -> str:
        """Count and return the status of the answer, `closed` or `hang`."""
        answer, status = b"", "closed"
        try:
            with self.connect() as sock:  # an answer may come before the whole request is sent
                threading.Thread(target=send_all, args=(sock, request), daemon=True).start()
                while len(answer) < 12 and (piece := sock.recv(1 << 16)):
                    answer += piece
        except TimeoutError:
            status = "hang"
        except OSError:
            pass  # reset by the server
        if code := re.match(rb"HTTP/1\.[01] (\d{3})", answer):
            status = code[1].decode()
        self.statuses[status] += 1
        if status == "hang" or status.startswith("5"):
            self.faults.append(f"{status}: {request[:300]!r}")
        return status

    def visit(self) -> None:
        """The visitor: a short question every 0.2 s."""
        while not self.done.wait(0.2):
            begin = time.monotonic()
            if self.send(ask()) != "429":
                self.visits.append(time.monotonic() - begin)

    def stall(self, half_sent: int, seconds: int) -> None:
        """Connections with half a body, and 20 that send a byte now and then."""
        halves = [ask("x" * 20_000)[:10_000]] * half_sent + [b"POST /generate HTTP/1.1\r\nX-"] * 20
        with contextlib.ExitStack() as connections:
            sockets = [connections.enter_context(self.connect()) for _ in halves]
            for sock, half in zip(sockets, halves, strict=True):
                send_all(sock, half)
            for _ in range(seconds):
                time.sleep(1)
                for sock in sockets[half_sent:]:
                    send_all(sock, b"x")

    def fuzz(self, examples: int, seed: int) -> None:
        """So many requests of each route, by schemathesis."""
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{self.server.port}/openapi.json",
             "--phases", "coverage,fuzzing", "--max-examples", str(examples), "--checks", CHECKS,
             "--request-timeout", str(HANG_SECONDS), "--seed", str(seed), "--continue-on-failure", "--no-color"],
            capture_output=True, text=True)
        count = re.search(r"([\d,]+) generated", done.stdout)
        self.statuses["schemathesis"] += int(count[1].replace(",", "")) if count else 0
        if done.returncode:
            self.faults.append(done.stdout[-20_000:] + done.stderr[-2000:])


def send_all(sock: socket.socket, data: bytes) -> None:
    """Send, unless the server has closed the connection."""
    with contextlib.suppress(OSError):
        sock.sendall(data)


def run(options: argparse.Namespace) -> int:
    """All phases; 1 after a fault."""
    runtime, rng = choose_device(options.device, options.dtype, log=None), np.random.default_rng(options.seed)
    cases = [*odd_requests(rng), *hostile_files(rng, int((options.megapixels * 0.98e6) ** 0.5))]
    flags = ("--max_megapixels", str(options.megapixels), "--max_seconds", "5")
    with Server(options.model, str(runtime.device), *flags) as server:
        traffic = Traffic(server)
        traffic.send(show(saved(Image.new("RGB", (500, 400)))))
        traffic.send(ask("USER: draw a fish\nASSISTANT:", force_boi=True, max_new_tokens=40))
        idle = server.memory_mb()
        Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak counts from here
        with ThreadPoolExecutor(10) as pool:
            visitor = pool.submit(traffic.visit)
            try:
                for _ in range(20):  # clients that ask for a long answer and leave
                    with traffic.connect() as sock:
                        sock.sendall(ask(max_new_tokens=2048, num_beams=8, temperature=5.0, top_p=1.0))
                stalled = pool.submit(traffic.stall, options.half_sent, options.stall_seconds)
                list(pool.map(lambda number: traffic.send(cases[number]), rng.permutation(len(cases))))
                stalled.result()
                traffic.fuzz(options.examples, options.seed)
            finally:
                traffic.done.set()
            visitor.result()
        peak = server.memory_mb("VmHWM")
        traffic.send(ask())
    if server.process.returncode:
        traffic.faults.append(f"the server ended with exit code {server.process.returncode}")
    print_line("hostile", runtime.device, {"seed": options.seed, "megapixels": options.megapixels}, {
        "requests": sum(traffic.statuses.values()), "by_status": dict(traffic.statuses), "faults": traffic.faults,
        "idle_mb": round(idle), "peak_mb_above_idle": round(peak - idle),
        "visitor_seconds": [rounded(statistics.median(traffic.visits)), rounded(max(traffic.visits))]})
    if traffic.faults:
        sys.stderr.writelines(server.log)
    return int(bool(traffic.faults))


if __name__ == "__main__":
    parser = base_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=20, help="requests of each route by schemathesis")
    parser.add_argument("--megapixels", type=int, default=32, help="--max_megapixels, and the size of the bombs")
    parser.add_argument("--half-sent", type=int, default=300, help="connections with half a body")
    parser.add_argument("--stall-seconds", type=int, default=45, help="how long those are kept")
    start(run, parser)
