"""Faults of the model server: every answer that arrives must be the one computed alone.

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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from chaos_requests import BROKEN, OUT_OF_MEMORY, PNG, Job, compare, make_jobs, read_answer
from serving import Client, Server
from shared import device_parser, print_line, rounded, start

from seed_multimodal.device import choose_device

SYSTEMS = ("pretrained/nano", "pretrained/nano-x", "pretrained/nano-lavit")
FAULTS = Path(__file__).with_name("faults.py")
HANG_SECONDS = 120.0
READY_SECONDS = 20.0


class FaultRun:
    """A server, requests to it, faults, and what came back; `start` starts a server."""

    def __init__(self, start: Callable[..., Server]) -> None:
        self.start = start
        self.server = start()
        self.outcomes = collections.Counter[str]()
        self.with_images = 0  # answers with images, whose pixels were compared
        self.problems: list[str] = []
        self.answers: dict[int, str] = {}  # of jobs, computed alone
        self.faulty_until = 0.0  # connections may be lost until then
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

    def client_loop(self, jobs: list[Job], seed: float) -> None:
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
        if status == 0 and content == "lost" and self.in_fault_window(begin):
            outcome = "lost with the server or disk"
            time.sleep(0.5)
        elif status == 0:
            outcome = content
        elif status == 429:
            outcome = "busy"
            time.sleep(0.2)
        elif status == 503 and OUT_OF_MEMORY in content:
            outcome = "out of memory"
        elif expected is None:
            outcome = "broken image" if status == 400 else outcome
        elif status in (200, 400):
            outcome = compare(f"{status} {content}", expected)
            self.with_images += bool(PNG.search(expected))
        elif self.in_fault_window(begin):
            outcome = f"status {status} during a fault"
        self.outcomes[outcome] += 1
        if outcome in ("differs", "hang", "lost") or outcome.startswith("status"):
            self.problems.append(f"{outcome}: {content[:300]} expected {(expected or '')[:300]}")

    def in_fault_window(self, begin: float) -> bool:
        """Whether the server was killed, or its disk full, since `begin`."""
        return self.faulty_until >= begin

    # ---- the server

    def fill_disk(self, seconds: float) -> None:
        """Let no file of the server grow for some seconds."""
        pid = self.server.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        self.done.wait(seconds)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))

    def kill_and_restart(self, seconds: float) -> None:
        """SIGKILL under load, then a new server on the same port, for as long as that takes."""
        self.server.process.send_signal(signal.SIGKILL)
        self.server.process.wait()
        begin = time.monotonic()
        self.server = self.start("--port", str(self.server.port))
        self.restarts.append(time.monotonic() - begin)

    def inject_faults(self, seconds: float, kills_from: float) -> None:
        """A fault every few seconds; memory is recorded until the server is first killed."""
        begin = time.monotonic()
        every = max(seconds / 24, 5.0)
        next_fault = begin + every
        while self.server.process.poll() is None and (now := time.monotonic()) < begin + seconds:
            faults = FATAL
            if now < begin + kills_from:
                faults = SURVIVED
                self.memory.append((now - begin, self.server.memory_mb("RssAnon")))
            if now >= next_fault:
                self.faulty_until = float("inf")
                random.choice(faults)(self, every / 4)
                self.faulty_until = time.monotonic()
                next_fault = time.monotonic() + every
            time.sleep(min(1.0, every / 4))


# Faults that the server survives, and those that end it; each may last so many seconds.
SURVIVED = (FaultRun.fill_disk,)
FATAL = (FaultRun.kill_and_restart,)


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
    start_server = partial(Server, model, device, options.dtype)
    rng = random.Random(options.seed)
    alone = FaultRun(start_server)
    with alone.server as server:
        jobs = make_jobs(Client(server), rng, options.count)
        answers = dict(enumerate("{} {}".format(*alone.send(job)) for job in jobs))

    # 2. The same requests with faults.
    fault_run = FaultRun(partial(start_server, program=FAULTS))
    fault_run.answers = answers
    seconds = 60 * options.minutes / len(options.models)
    with ThreadPoolExecutor(options.clients) as pool:
        clients = [
            pool.submit(fault_run.client_loop, jobs, rng.random()) for _ in range(options.clients)
        ]
        try:
            fault_run.inject_faults(seconds, seconds if options.no_kills else seconds * 2 / 3)
        finally:
            fault_run.done.set()
        for client in clients:
            client.result()
    with fault_run.server:
        # It still answers, and nothing is left in its queue.
        fault_run.check(*fault_run.send(jobs[0]), time.monotonic(), answers[0])
    if fault_run.server.process.returncode:
        fault_run.problems.insert(0, f"exit code {fault_run.server.process.returncode}")
    slowest = max(fault_run.restarts, default=0.0)
    slope, interval = growth(fault_run.memory)
    results = {
        "requests": sum(fault_run.outcomes.values()),
        "images": fault_run.with_images,
        "outcomes": dict(fault_run.outcomes.most_common()),
        "problems": fault_run.problems[:20],
        "restarts": len(fault_run.restarts),
        "slowest_restart_seconds": rounded(slowest),
        "mb": [round(mb) for _, mb in fault_run.memory[:: max(len(fault_run.memory) // 8, 1)]],
        "mb_per_hour": slope,
        "mb_per_hour_interval": interval,
    }
    return results, not fault_run.problems and slowest <= READY_SECONDS


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
    parser.add_argument("--clients", type=int, default=32, help="at the same time")
    parser.add_argument(
        "--no-kills",
        action="store_true",
        help="do not kill the server; sample its memory to the end",
    )
    parser.add_argument("--count", type=int, default=8, help="different requests of each route")
    parser.add_argument("--seed", type=int, default=0, help="of requests and times")
    start(run, parser)
