"""Time the server: answers per second, latency and time to the first piece with one client and several. JSON lines.

    python benchmarks/serving.py                                        pretrained/nano; 1, 4, 8, 16 and 32 clients
    python benchmarks/serving.py --device cuda --model pretrained/seed_x_i --clients 1 8 32
    python benchmarks/serving.py --minutes 10 --clients 32              a soak: errors, and memory at start and end

Starts `gradio_demo/seed_llama_flask.py` on a free port of the loopback address and asks `/v1/chat/completions` for
streams: `describe` sends an image that was not sent before, `draw` a text that is answered with an image. `plain` is
one client.
"""

from __future__ import annotations

import argparse
import base64
import collections
import io
import itertools
import json
import re
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

Times = tuple[float, float] | None  # seconds to the first piece and to the last; None: an error


class Server:
    """`gradio_demo/seed_llama_flask.py` as a process; use it as a context manager."""

    def __init__(self, model: str, device: str, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "gradio_demo" / "seed_llama_flask.py"), "--system", str(system_folder(model)),
             "--port", "0", "--llm_device", device, "--tokenizer_device", device, *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
        assert self.process.stdout is not None
        self.log = collections.deque[str](maxlen=200)
        for line in self.process.stdout:
            self.log.append(line)
            if address := re.search(r"answering at http://127\.0\.0\.1:(\d+)", line):
                self.port = int(address[1])
                break
        else:
            raise SystemExit("The server did not start:\n" + "".join(self.log))
        threading.Thread(target=self.log.extend, args=(self.process.stdout,), daemon=True).start()  # empties the pipe

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
        self.numbers, self.images = itertools.count(), itertools.cycle(input_images(256))

    def body(self, kind: str) -> dict[str, Any]:
        if kind == "draw":
            return {"messages": [{"role": "user", "content": "Please draw a fish."}], "force_image": True,
                    "seed": next(self.numbers), "max_tokens": 40}
        file = io.BytesIO()
        next(self.images).rotate(next(self.numbers) % 360).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe the image."}]
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 32}

    def send(self, body: dict[str, Any]) -> Times:
        """Ask, and read the stream to its end."""
        request = urllib.request.Request(self.address, json.dumps({**body, "stream": True}).encode(),
                                         {"Content-Type": "application/json"})
        first, begin = 0.0, time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                for line in answer:
                    first = first or time.perf_counter() - begin
                    if b'"error"' in line[:20]:
                        return None
        except OSError:
            return None
        return first, time.perf_counter() - begin

    def send_all(self, bodies: list[dict[str, Any]], clients: int) -> list[Times]:
        with ThreadPoolExecutor(clients) as pool:
            return [*pool.map(self.send, bodies)]


def share(values: list[float], part: float) -> float:
    """The value that `part` of all do not exceed."""
    return rounded(sorted(values)[min(int(part * len(values)), len(values) - 1)]) if values else 0.0


def figures(times: list[Times], seconds: float) -> dict[str, Any]:
    """Rate, percentiles, errors."""
    good = [one for one in times if one is not None]
    whole = [one[1] for one in good]
    return {"requests_per_second": rounded(len(good) / seconds), "first_p50": share([one[0] for one in good], 0.5),
            **{f"p{part}": share(whole, part / 100) for part in (50, 95, 99)}, "errors": len(times) - len(good)}


def soak(server: Server, client: Client, clients: int, minutes: float) -> dict[str, Any]:
    """Both kinds of requests, one after another from each client, for so many minutes."""
    until, begin = time.perf_counter() + 60 * minutes, time.perf_counter()

    def visit(number: int) -> list[Times]:
        times: list[Times] = []
        while time.perf_counter() < until:
            times.append(client.send(client.body(("describe", "draw")[(len(times) + number) % 2])))
        return times

    with ThreadPoolExecutor(clients) as pool:
        visits = pool.map(visit, range(clients))
        time.sleep(min(60, 15 * minutes))  # by then every part has been used
        before = server.memory_mb()
        times = [one for visit in visits for one in visit]
    return {**figures(times, time.perf_counter() - begin), "requests": len(times), "mb_at_start": round(before),
            "mb_at_end": round(server.memory_mb())}


def run(options: argparse.Namespace) -> None:
    """Time each kind of request with each number of clients, or both together for some minutes."""
    runtime = choose_device(options.device, options.dtype, log=None)
    settings = {"model": options.model, "device": str(runtime.device)}
    with Server(options.model, str(runtime.device), "--dtype", options.dtype) as server:
        client = Client(server)
        if options.minutes:
            for clients in options.clients:
                print_line("serving", runtime.device, {"variant": "soak", "clients": clients, **settings},
                           soak(server, client, clients, options.minutes))
            return
        for kind in ("describe", "draw"):
            plain = 0.0
            for clients in options.clients:
                client.send_all([client.body(kind) for _ in range(clients)], clients)  # warm-up
                bodies = [client.body(kind) for _ in range(max(options.requests, 4 * clients))]
                begin = time.perf_counter()
                times = client.send_all(bodies, clients)
                results = figures(times, time.perf_counter() - begin)
                plain = plain or results["requests_per_second"]
                print_line("serving", runtime.device, {
                    "variant": "plain" if clients == options.clients[0] else "clients", "request": kind,
                    "clients": clients, **settings}, {
                    **results, "times_plain": round(results["requests_per_second"] / max(plain, 1e-9), 2)})


if __name__ == "__main__":
    parser = base_parser(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="numbers of clients")
    parser.add_argument("--requests", type=int, default=32, help="for each number of clients, and four of each client")
    parser.add_argument("--minutes", type=float, default=0, help="ask for so long instead")
    start(run, parser)
