"""Time the server: answers per second, latency and time to the first piece, in JSON lines.

    python benchmarks/serving.py                             nano; 1, 4, 8, 16 and 32 clients
    python benchmarks/serving.py --device cuda --model pretrained/seed_x_i --clients 1 8 32
    python benchmarks/serving.py --minutes 10 --clients 32   errors, and memory at start and end

Starts the server on a free port; asks `/v1/chat/completions` for streams: `describe` and `ask` (a
short question) send an image that was not sent before, `draw` a text that is answered with an
image.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shared import ROOT, base_parser, input_images, print_line, rounded, start, system_folder

from seed_multimodal.device import choose_device
from seed_multimodal.images.io import image_to_base64
from seed_multimodal.language import prompts as sentences

PROGRAM = ROOT / "gradio_demo" / "seed_llama_flask.py"
KINDS = ("describe", "ask", "draw")
REQUESTS = {
    "describe": sentences.DESCRIBE_PROMPT,
    "ask": f"What is on the left?{sentences.QA_SUFFIX}",
}
Times = tuple[float, float] | None  # seconds to the first piece and the last; None: an error


class Server:
    """The server as a process; use it as a context manager."""

    def __init__(
        self, model: str, device: str, dtype: str, *flags: str, program: Path = PROGRAM
    ) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(program),
                "--system",
                str(system_folder(model)),
                "--port",
                "0",
                "--llm_device",
                device,
                "--tokenizer_device",
                device,
                "--dtype",
                dtype,
                *flags,
            ],
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        lines: Any = self.process.stdout
        address = next((line for line in lines if "answering at" in line), "")
        if not address:
            raise SystemExit("The server did not start.")
        self.port = int(address.split(":")[2].partition("/")[0])
        threading.Thread(
            target=collections.deque, args=(lines, 0), daemon=True
        ).start()  # empties the pipe

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(30)

    def memory_mb(self, key: str = "VmRSS") -> float:
        """Memory of the process: `VmRSS` (now) or `VmHWM` (peak)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"{key}:")[2].split()[0]) / 1000


class Client:
    """Requests of one kind, each with its own image or seed."""

    def __init__(self, server: Server) -> None:
        self.address = f"http://127.0.0.1:{server.port}/v1/chat/completions"
        self.numbers = itertools.count()
        self.images = itertools.cycle(input_images(256))

    def body(self, kind: str) -> dict[str, Any]:
        if kind == "draw":
            return {
                "messages": [{"role": "user", "content": "Please draw a fish."}],
                "force_image": True,
                "seed": next(self.numbers),
                "max_tokens": 40,
            }
        url = (
            "data:image/png;base64,"
            f"{image_to_base64(next(self.images).rotate(next(self.numbers) % 360))}"
        )
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": REQUESTS[kind]},
        ]
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 256}

    def send(self, body: dict[str, Any]) -> Times:
        """Ask, and read the stream to its end."""
        request = urllib.request.Request(
            self.address,
            json.dumps({**body, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        begin = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                line = answer.readline()
                first = time.perf_counter() - begin
                rest = answer.read()
        except OSError:
            return None
        return (first, time.perf_counter() - begin) if b'{"error"' not in line + rest else None

    def send_all(self, kind: str, count: int, clients: int) -> dict[str, Any]:
        bodies = [self.body(kind) for _ in range(count)]
        begin = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            times = [*pool.map(self.send, bodies)]
        return figures(times, time.perf_counter() - begin)


def figures(times: list[Times], seconds: float) -> dict[str, Any]:
    """Rate, percentiles in seconds, errors."""
    good = sorted(result[1] for result in times if result is not None)
    first = sorted(result[0] for result in times if result is not None)
    return {
        "requests_per_second": rounded(len(good) / seconds),
        "first_p50": rounded(first[len(first) // 2]),
        **{f"p{part}": rounded(good[len(good) * part // 100]) for part in (50, 95, 99)},
        "errors": len(times) - len(good),
    }


def soak(server: Server, client: Client, clients: int, minutes: float) -> dict[str, Any]:
    """All kinds of requests, one after another from each client, for so many minutes."""
    begin = time.perf_counter()

    def visit(index: int) -> list[Times]:
        times: list[Times] = []
        while time.perf_counter() < begin + 60 * minutes:
            times.append(client.send(client.body(KINDS[(len(times) + index) % len(KINDS)])))
        return times

    with ThreadPoolExecutor(clients) as pool:
        visits = pool.map(visit, range(clients))
        time.sleep(min(60, 15 * minutes))  # by then every part has been used
        before = server.memory_mb()
        times = [result for visit in visits for result in visit]
    return {
        **figures(times, time.perf_counter() - begin),
        "requests": len(times),
        "mb_at_start": round(before),
        "mb_at_end": round(server.memory_mb()),
    }


def run(options: argparse.Namespace) -> None:
    """Time each kind of request with each number of clients, or all together for some minutes."""
    runtime = choose_device(options.device, options.dtype, log=None)
    with Server(options.model, str(runtime.device), options.dtype) as server:
        client = Client(server)
        if options.minutes:
            print_line(
                "serving",
                options,
                runtime,
                {"variant": "soak", "clients": options.clients[-1]},
                soak(server, client, options.clients[-1], options.minutes),
            )
            return
        for kind in options.kinds:
            plain = 0.0
            for clients in options.clients:
                client.send_all(kind, clients, clients)  # warm-up
                results = client.send_all(kind, max(options.requests, 4 * clients), clients)
                plain = plain or results["requests_per_second"]
                print_line(
                    "serving",
                    options,
                    runtime,
                    {
                        "variant": "plain" if clients == options.clients[0] else "clients",
                        "request": kind,
                        "clients": clients,
                    },
                    {
                        **results,
                        "times_plain": round(results["requests_per_second"] / max(plain, 1e-9), 2),
                    },
                )


if __name__ == "__main__":
    parser = base_parser(__doc__)
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="numbers of clients"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of requests"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=32,
        help="for each number of clients, and four of each client",
    )
    parser.add_argument("--minutes", type=float, default=0, help="ask for so long instead")
    start(run, parser)
