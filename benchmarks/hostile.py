"""Send the server generated hostile traffic; measure what a visitor and the machine notice. One JSON line.

    python benchmarks/hostile.py

Several connections send odd JSON, decompression bombs, damaged files and broken HTTP in an order of the seed's; other
clients leave, send half a body, or a byte now and then. Meanwhile a visitor asks every 0.2 s (median and longest wait).
The exit code is 1 after an answer 5xx, a hang (no answer and no end of the connection in time) or a dead server.
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


def odd_requests(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of requests: JSON with wrong types and sizes, deep nesting, invalid text; broken HTTP."""
    for name in ("temperature", "top_p", "num_beams", "max_new_tokens", "seed", "force_boi", "text", "images"):
        for value in (0, -1, 1.5, 1e-45, 1e308, 10**400, 2**63, True, None, "1", [], {}, "<image>" * 17, "\ud800",
                      "a" * 32_001, [[0] * 31], [[-1] * 32], [[0] * 40_000], ["data:image/png;base64,"]):
            yield f"{name}={value!r:.30}", ask(**{name: value})
        yield f"{name}=NaN", post(b'{"text": "<image>", "images": [""], "%s": NaN}' % name.encode())
    yield "29 MB that are no image", ask("<image>", ["A" * 29_000_000])
    for body in (b"", b"{", b"null", b"\xff\xfe", "{}".encode("utf-16"), b"[" * 100_000, b'{"a":' * 100_000,
                 b'{"text": "x", "images": [[' + b"1," * 4_000_000 + b"1]]}", b'["' + b'\\"' * 200_000):
        yield f"body {body[:20]!r} of {len(body)}", post(body)
    chunked = b"POST /generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    yield "chunked, over the limit", chunked + (b"100000\r\n" + b"x" * 2**20 + b"\r\n") * 70 + b"0\r\n\r\n"
    yield "chunked, wrong size", chunked + b"zz\r\n{}\r\n0\r\n\r\n"
    yield "over the limit", post(b" " * (66 << 20))
    yield "long header", post(b"{}", "X-Long: " + "x" * 300_000)
    yield "not HTTP", rng.bytes(3000).replace(b"\r\n", b"") + b"\r\n\r\n"


def hostile_files(rng: np.random.Generator, side: int) -> Iterator[tuple[str, bytes]]:
    """Decompression bombs and damaged files; `side`: of a square just within the limit of pixels."""
    bomb = saved(Image.new("1", (side, side)))  # 31 megapixels in 4 kB
    yield "16 one-bit bombs", show(*[bomb] * 16)
    yield "one-bit bomb, three times too large", show(saved(Image.new("1", (side, 3 * side))))
    for mode in ("L", "P", "RGBA"):
        yield f"PNG {mode} at the limit", show(saved(Image.new(mode, (side, side))))
    noise = Image.fromarray(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)).resize((side, side))
    for options in ({}, {"progressive": True, "subsampling": 0}):
        yield f"JPEG at the limit {options}", show(saved(noise, "JPEG", quality=30, **options))
    small = saved(noise.resize((900, 900)), "JPEG", progressive=True)
    scan = small.rindex(b"\xff\xda")
    yield "JPEG of 100,000 scans", show(small[:scan] + small[scan:-2][:40] * 100_000)
    for kind in ("GIF", "WEBP", "AVIF", "JPEG2000", "TIFF", "PNG", "JPEG", "BMP"):
        if kind in Image.SAVE:
            whole = bytearray(saved(noise.resize((min(side, 1500),) * 2), kind))
            yield f"{kind} of 1,500 squared", show(bytes(whole))
            yield f"half a {kind}", show(bytes(whole[:len(whole) // 2]))
            for place in rng.integers(0, len(whole), 20):
                whole[place] = rng.integers(256)
            yield f"damaged {kind}", show(bytes(whole))


class Traffic:
    """Requests to one server, and what came back."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.statuses = collections.Counter[str]()
        self.faults: list[str] = []  # 5xx and hangs
        self.visits: list[float] = []  # seconds of the visitor's answers
        self.done = threading.Event()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=HANG_SECONDS)

    def send(self, name: str, request: bytes) -> str:
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
            self.faults.append(f"{name}: {status}")
        return status

    def visit(self) -> None:
        """The visitor: a short question every 0.2 s."""
        while not self.done.wait(0.2):
            start = time.monotonic()
            if self.send("visitor", ask()) != "429":
                self.visits.append(time.monotonic() - start)

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


def memory_mb(server: Server, key: str) -> float:
    """Memory of the server: `VmRSS` (now) or `VmHWM` (peak)."""
    return int(Path(f"/proc/{server.process.pid}/status").read_text().partition(f"{key}:")[2].split()[0]) / 1000


def send_all(sock: socket.socket, data: bytes) -> None:
    """Send, unless the server has closed the connection."""
    try:
        sock.sendall(data)
    except OSError:
        return


def run(options: argparse.Namespace) -> int:
    """All phases; 1 after a fault."""
    runtime, rng = choose_device(options.device, options.dtype, log=None), np.random.default_rng(options.seed)
    cases = [*odd_requests(rng), *hostile_files(rng, int((options.megapixels * 0.98e6) ** 0.5))]
    with Server(options.model, str(runtime.device), "--max_megapixels", str(options.megapixels)) as server:
        traffic = Traffic(server)
        traffic.send("ordinary image", show(saved(Image.new("RGB", (500, 400)))))
        traffic.send("ordinary drawing", ask("USER: draw a fish\nASSISTANT:", force_boi=True, max_new_tokens=40))
        idle = memory_mb(server, "VmRSS")
        Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak counts from here
        with ThreadPoolExecutor(10) as pool:
            visitor = pool.submit(traffic.visit)
            try:
                for _ in range(20):  # clients that ask for a long answer and leave
                    with traffic.connect() as sock:
                        sock.sendall(ask(max_new_tokens=2048, num_beams=8, temperature=5.0, top_p=1.0))
                stalled = pool.submit(traffic.stall, options.half_sent, options.stall_seconds)
                list(pool.map(lambda number: traffic.send(*cases[number]), rng.permutation(len(cases))))
                stalled.result()
            finally:
                traffic.done.set()
            visitor.result()
        peak = memory_mb(server, "VmHWM")
        traffic.send("alive", ask())
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
    parser.add_argument("--megapixels", type=int, default=32, help="--max_megapixels, and the size of the bombs")
    parser.add_argument("--half-sent", type=int, default=300, help="connections with half a body")
    parser.add_argument("--stall-seconds", type=int, default=45, help="how long those are kept")
    start(run, parser)
