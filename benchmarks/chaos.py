"""Trouble for the model server: every answer that arrives must be the one computed alone.

    python benchmarks/chaos.py --minutes 120                 all shipped systems, 32 clients
    python benchmarks/chaos.py --minutes 5 --models pretrained/nano

Parts of the server run out of memory at random (`faults.py`), its files cannot grow for some
seconds (a full disk), clients are slow, leave, or send a broken image (every tenth request); in the
last third of the time it is killed under load and started again. Prints a JSON line for each
system; the exit code is 1 after a wrong answer, an unexpected status, a hang, or a restart that
takes more than 20 s.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import random
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from chaos_requests import BROKEN, PNG, Job, compare, make_jobs, read_answer
from serving import Client, Server
from shared import device_parser, print_line, rounded, start

from seed_multimodal.device import choose_device

SYSTEMS = ("pretrained/nano", "pretrained/nano-x", "pretrained/nano-lavit")
FAULTS = Path(__file__).with_name("faults.py")
HANG_SECONDS = 120.0
READY_SECONDS = 20.0


class Trouble:
    """A server, requests to it, and what came back."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.outcomes = collections.Counter[str]()
        self.with_images = 0  # answers with images, whose pixels were compared
        self.problems: list[str] = []
        self.answers: dict[int, str] = {}  # of jobs, computed alone
        self.disturbed_until = 0.0  # connections may be lost until then
        self.restarts: list[float] = []  # seconds until the server was ready
        self.memory: list[tuple[float, float]] = []  # seconds, MB of anonymous memory
        self.done = threading.Event()

    # ---- requests

    def send(
        self, job: Job, pause: float = 0.0, leave_after: float | None = None
    ) -> tuple[int, str]:
        """Status and content of the answer; 0 and the reason without one.

        pause: between pieces of the body and of the answer, of a slow client.
        leave_after: seconds after which the client disconnects.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=HANG_SECONDS)
        try:
            connection.putrequest("POST", job.path)
            connection.putheader("Content-Type", job.content_type)
            connection.putheader("Content-Length", str(len(job.body)))
            connection.endheaders()
            size = len(job.body) // 8 + 1 if pause else len(job.body)
            for begin in range(0, len(job.body), size):
                connection.send(job.body[begin : begin + size])
                time.sleep(pause)
            if leave_after is not None:
                time.sleep(leave_after)
                return 0, "left"
            response = connection.getresponse()
            content = b""
            while piece := response.read(1 << 14):
                content += piece
                time.sleep(pause)
        except TimeoutError:
            return 0, "hang"
        except (OSError, http.client.HTTPException):
            return 0, "lost"
        finally:
            connection.close()
        return read_answer(response.status, content.decode())

    def visit(self, jobs: list[Job], seed: float) -> None:
        """A client: one request after another."""
        rng = random.Random(seed)
        while not self.done.is_set():
            index = rng.randrange(len(jobs))
            chance = rng.random()
            begin = time.monotonic()
            if chance < 0.1:
                status, content = self.send(BROKEN)
                self.check(status, content, begin, expected=None)
            elif chance < 0.15:
                self.send(jobs[index], leave_after=rng.random())
                self.outcomes["left"] += 1
            else:
                pause = 0.3 * rng.random() if chance < 0.2 else 0.0
                status, content = self.send(jobs[index], pause)
                self.check(status, content, begin, self.answers[index])

    def check(self, status: int, content: str, begin: float, expected: str | None) -> None:
        """Count the outcome of a request; `expected`: None for a broken image."""
        outcome = f"status {status}"
        if status == 0 and content == "lost" and self.is_disturbed(begin):
            outcome = "lost with the server or disk"
            time.sleep(0.5)
        elif status == 0:
            outcome = content
        elif status == 429:
            outcome = "busy"
            time.sleep(0.2)
        elif status in (500, 503) and ("memory" in content or self.is_disturbed(begin)):
            outcome = "out of memory"
        elif expected is None:
            outcome = "broken image" if status == 400 else outcome
        elif status in (200, 400):
            outcome = compare(f"{status} {content}", expected)
            self.with_images += bool(PNG.search(expected))
        self.outcomes[outcome] += 1
        if outcome in ("differs", "hang", "lost") or outcome.startswith("status"):
            self.problems.append(f"{outcome}: {content[:300]} expected {(expected or '')[:300]}")

    def is_disturbed(self, begin: float) -> bool:
        """Whether the server was killed, or its disk full, since `begin`."""
        return self.disturbed_until >= begin

    # ---- the server

    def fill_disk(self, seconds: float) -> None:
        """Let no file of the server grow for some seconds."""
        self.disturbed_until = float("inf")
        pid = self.server.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        self.done.wait(seconds)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
        self.disturbed_until = time.monotonic()

    def kill_and_restart(self, model: str, device: str) -> None:
        """SIGKILL under load, then a new server on the same port."""
        self.disturbed_until = float("inf")
        self.server.process.send_signal(signal.SIGKILL)
        self.server.process.wait()
        begin = time.monotonic()
        port = ("--port", str(self.server.port))
        self.server = Server(model, device, *port, program=FAULTS)
        self.restarts.append(time.monotonic() - begin)
        self.disturbed_until = time.monotonic()

    def direct(self, seconds: float, kills_from: float, model: str, device: str) -> None:
        """What happens to the server; its memory is recorded until the first kill."""
        begin = time.monotonic()
        every = max(seconds / 24, 5.0)
        next_fault = begin + every
        while self.server.process.poll() is None and (now := time.monotonic()) < begin + seconds:
            if now < begin + kills_from:
                self.memory.append((now - begin, self.server.memory_mb("RssAnon")))
            if now >= next_fault:
                if now < begin + kills_from:
                    self.fill_disk(every / 4)
                else:
                    self.kill_and_restart(model, device)
                next_fault = time.monotonic() + every
            time.sleep(min(1.0, every / 4))


def growth(memory: list[tuple[float, float]]) -> tuple[int, int]:
    """MB in an hour, by a line through the second half of the samples, and its 95 % interval.

    The interval is that of ten means of neighbouring samples, which depend on each other.
    """
    half = memory[len(memory) // 2 :]
    if len(half) < 10:
        return 0, 0
    means = np.array([part.mean(0) for part in np.array_split(np.array(half), 10)])
    (slope, _), covariance = np.polyfit(means[:, 0] / 3600, means[:, 1], 1, cov=True)
    return round(float(slope)), round(2.31 * float(covariance[0, 0]) ** 0.5)  # t of 8 degrees


def measure(model: str, device: str, options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Figures of one system, and whether all went as it must."""
    # 1. Each answer alone, from a server without faults.
    rng = random.Random(options.seed)
    with Server(model, device) as server:
        jobs = make_jobs(Client(server), rng, options.count)
        alone = Trouble(server)
        answers = dict(enumerate("{} {}".format(*alone.send(job)) for job in jobs))

    # 2. The trouble.
    trouble = Trouble(Server(model, device, program=FAULTS))
    trouble.answers = answers
    seconds = 60 * options.minutes / len(options.models)
    with ThreadPoolExecutor(options.clients) as pool:
        visits = [pool.submit(trouble.visit, jobs, rng.random()) for _ in range(options.clients)]
        kills_from = seconds * 2 / 3 if options.kills else seconds
        try:
            trouble.direct(seconds, kills_from, model, device)
        finally:
            trouble.done.set()
        for visit in visits:
            visit.result()
    with trouble.server:
        # It still answers, and nothing is left in its queue.
        trouble.check(*trouble.send(jobs[0]), time.monotonic(), answers[0])
    if trouble.server.process.returncode:
        trouble.problems.append(f"exit code {trouble.server.process.returncode}")
    slowest = max(trouble.restarts, default=0.0)
    slope, interval = growth(trouble.memory)
    results = {
        "requests": sum(trouble.outcomes.values()),
        "images": trouble.with_images,
        "outcomes": dict(trouble.outcomes.most_common()),
        "problems": trouble.problems[:20],
        "restarts": len(trouble.restarts),
        "slowest_restart_seconds": rounded(slowest),
        "mb": [round(mb) for _, mb in trouble.memory[:: max(len(trouble.memory) // 8, 1)]],
        "mb_per_hour": slope,
        "mb_per_hour_interval": interval,
    }
    return results, not trouble.problems and slowest <= READY_SECONDS


def run(options: argparse.Namespace) -> int:
    runtime = choose_device(options.device, options.dtype, log=None)
    passed = True
    for model in options.models:
        results, as_it_must = measure(model, str(runtime.device), options)
        settings = {
            "model": model,
            "clients": options.clients,
            "minutes": options.minutes,
            "seed": options.seed,
        }
        print_line("chaos", options, runtime, settings, results)
        passed &= as_it_must
    return int(not passed)


if __name__ == "__main__":
    parser = device_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=SYSTEMS, help="folders of systems")
    parser.add_argument("--minutes", type=float, default=120, help="of all systems together")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument(
        "--no-kills", dest="kills", action="store_false", help="memory of all the time"
    )
    parser.add_argument("--count", type=int, default=8, help="different requests of each route")
    parser.add_argument("--seed", type=int, default=0)
    start(run, parser)
