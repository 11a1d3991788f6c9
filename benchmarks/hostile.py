"""Send the server for nano generated hostile traffic, and measure what an innocent visitor and the machine notice.

    python benchmarks/hostile.py                                      # about three minutes on two cores
    python benchmarks/hostile.py --half-sent 40 --megapixels 2 --seed 3

Starts `gradio_demo/seed_llama_flask.py` on the loopback address, lets it answer a few ordinary requests, and sends, in
an order of the seed's: every case of `hostile_traffic.py` from several connections at
once, clients that ask and leave, half-sent bodies, and connections that send a byte now and then. Meanwhile an innocent
visitor asks every 0.2 s. Prints one JSON line: requests, answers by status, 5xx, hangs (no answer and no end of the
connection in time), peak memory above that of the idle server, and the visitor's times. The exit code is 1 after a 5xx,
a hang or a dead server.
"""

from __future__ import annotations

import argparse
import collections
import re
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import hostile_traffic as traffic
import torch
from shared import positive, print_line

ROOT = Path(__file__).resolve().parents[1]
HANG_SECONDS = 60.0
SENDERS = 8


@dataclass
class Findings:
    """What was seen."""

    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)  # cases with a 5xx
    hangs: list[str] = field(default_factory=list)
    visitor: list[float] = field(default_factory=list)  # seconds of each of the innocent's answers
    turned_away: int = 0  # the innocent's answers 429

    def note(self, name: str, answer: bytes | None) -> None:
        """Count one answer (None: none came in time)."""
        if answer is None:
            self.hangs.append(name)
            return
        status = re.match(rb"HTTP/1\.[01] (\d{3})", answer)
        code = status[1].decode() if status else "closed"
        self.statuses[code] += 1
        if code.startswith("5") and code != "501":  # 501: a kind of request that HTTP lets a server not know
            self.faults.append(f"{name}: {code}")


class Server:
    """The server for nano as its own process."""

    def __init__(self, system: str, megapixels: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "gradio_demo" / "seed_llama_flask.py"), "--system", system, "--port", "0",
             "--llm_device", "cpu", "--tokenizer_device", "cpu", "--max_megapixels", str(megapixels)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
        assert self.process.stdout is not None and self.process.stderr is not None
        self.port, self.log = 0, collections.deque[str](maxlen=200)
        for line in self.process.stdout:
            if found := re.search(r"answering at http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise SystemExit(f"The server did not start: {self.process.stderr.read()}")
        for stream in (self.process.stdout, self.process.stderr):  # else a full pipe stops it
            threading.Thread(target=lambda stream=stream: self.log.extend(stream), daemon=True).start()

    def memory(self, key: str) -> float:
        """MB of `VmRSS` (now) or `VmHWM` (peak)."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{key}:\s+(\d+)", text)
        return int(found[1]) / 1000 if found else 0.0

    def forget_peak(self) -> None:
        """Count the peak from here."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANG_SECONDS)

    def send(self, request: bytes) -> bytes | None:
        """The whole answer; `b""`: the connection was closed without one; None: nothing in time."""
        answer = bytearray()
        try:
            with self.connect() as sock:
                rest = memoryview(request)
                deadline = time.monotonic() + HANG_SECONDS
                sock.setblocking(False)
                while time.monotonic() < deadline:
                    readable, writable, _ = select.select([sock], [sock] if rest else [], [], 1.0)
                    if readable:
                        piece = sock.recv(1 << 16)
                        answer += piece
                        if not piece:
                            return bytes(answer)
                    if writable:
                        rest = rest[sock.send(rest[:1 << 18]):]
                    if not rest and _whole(answer):
                        return bytes(answer)
                return None
        except TimeoutError:
            return None
        except OSError:  # reset by the server
            return bytes(answer)


def _whole(answer: bytearray) -> bool:
    """Whether a whole answer is there (the server may keep the connection)."""
    head, found, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return bool(found) and length is not None and len(body) >= int(length[1])


def visit(server: Server, findings: Findings, done: threading.Event) -> None:
    """The innocent visitor: a short question every 0.2 s."""
    number = 0
    while not done.is_set():
        began = time.monotonic()
        answer = server.send(traffic.ask("USER: hi\nASSISTANT:", seed=number))
        findings.note("innocent visitor", answer)
        if answer is not None and b" 429 " in answer[:20]:
            findings.turned_away += 1
        else:
            findings.visitor.append(time.monotonic() - began)
        number += 1
        done.wait(0.2)


def leave(server: Server, count: int) -> None:
    """Clients that ask for a long answer and close the connection at once."""
    for number in range(count):
        with server.connect() as sock:
            sock.sendall(traffic.ask("USER: Tell me all.\nASSISTANT:", max_new_tokens=2048, num_beams=8, seed=number,
                                     temperature=5.0, top_p=1.0))


def stall(server: Server, half_sent: int, dribbling: int, seconds: float) -> int:
    """Connections that send half a body, or a letter now and then; returns how many were still open at the end."""
    request = traffic.ask("USER: " + "x" * 20_000)
    held = []
    for number in range(half_sent + dribbling):
        sock = server.connect()
        sock.sendall(request[:len(request) // 2] if number < half_sent else b"POST /generate HTTP/1.1\r\nX-")
        held.append(sock)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for sock in held[half_sent:]:
            try:
                sock.sendall(b"x")
            except OSError:
                continue  # closed by the server, as it should be
        time.sleep(1)
    open_still = len(held)
    for sock in held:
        sock.settimeout(0.01)
        try:
            open_still -= not sock.recv(1)
        except TimeoutError:
            pass
        except OSError:
            open_still -= 1
        sock.close()
    return open_still


def attack(server: Server, options: argparse.Namespace, findings: Findings) -> dict[str, float]:
    """All phases; returns the figures."""
    requests = traffic.cases(options.seed, int((options.megapixels * 0.98e6) ** 0.5))
    for number in range(3):  # ordinary traffic first: an idle server has loaded and used everything
        server.send(traffic.show(traffic.stored(traffic.Image.new("RGB", (500, 400)))))
        server.send(traffic.ask("USER: draw a fish\nASSISTANT:", force_boi=True, max_new_tokens=40, seed=number))
    idle = server.memory("VmRSS")
    server.forget_peak()
    done = threading.Event()
    visitor = threading.Thread(target=visit, args=(server, findings, done))
    visitor.start()
    leave(server, options.leaving)
    with ThreadPoolExecutor(SENDERS) as pool:
        stalled = pool.submit(stall, server, options.half_sent, 20, options.stall_seconds)
        for (name, _), answer in zip(requests, pool.map(server.send, [request for _, request in requests]),
                                     strict=True):
            findings.note(name, answer)
        open_still = stalled.result()
    done.set()
    visitor.join()
    times = sorted(findings.visitor) or [HANG_SECONDS]
    return {"idle_mb": round(idle, 1), "peak_mb_above_idle": round(server.memory("VmHWM") - idle, 1),
            "after_mb_above_idle": round(server.memory("VmRSS") - idle, 1), "stalled_connections_open": open_still,
            "visitor_median_s": round(statistics.median(times), 3),
            "visitor_p95_s": round(times[int(0.95 * (len(times) - 1))], 3), "visitor_worst_s": round(times[-1], 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="nano", help="the server's --system")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megapixels", type=positive, default=32, help="--max_megapixels, and size of the bombs")
    parser.add_argument("--leaving", type=positive, default=20, help="clients that leave")
    parser.add_argument("--half-sent", type=positive, default=300, help="connections with half a body")
    parser.add_argument("--stall-seconds", type=float, default=45.0, help="how long those are kept")
    options = parser.parse_args()
    findings, server = Findings(), Server(options.system, options.megapixels)
    try:
        results = attack(server, options, findings)
        alive = server.process.poll() is None and server.send(traffic.post(b"", path="/health", method="GET"))
    finally:
        server.process.terminate()
        ended = server.process.wait(30)
    if not alive or ended != 0:
        findings.faults.append(f"the server ended with exit code {ended}")
    print_line("hostile", torch.device("cpu"), {"seed": options.seed, "megapixels": options.megapixels}, {
        "requests": sum(findings.statuses.values()) + len(findings.hangs), "by_status": dict(findings.statuses),
        "5xx": len(findings.faults), "hangs": len(findings.hangs), **results,
        "visitor_answers": len(findings.visitor), "visitor_turned_away": findings.turned_away})
    for line in (*findings.faults, *(f"{name}: no answer in {HANG_SECONDS:g} s" for name in findings.hangs)):
        sys.stderr.write(line + "\n")
    if findings.faults:
        sys.stderr.writelines(server.log)
    return int(bool(findings.faults or findings.hangs))


if __name__ == "__main__":
    sys.exit(main())
