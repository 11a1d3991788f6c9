"""Time the server: requests per second and latency with one client and with several at once. One JSON line for each.

    python benchmarks/serving.py                                        pretrained/nano
    python benchmarks/serving.py --device cuda --model pretrained/seed_x_i --clients 1 8 32

Starts `gradio_demo/seed_llama_flask.py` on a free port of the loopback address. `describe` sends an image that was not
sent before, `draw` a text that is answered with an image. `plain` is one client.
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

from PIL import Image
from shared import ROOT, base_parser, input_images, print_line, rounded, start, system_folder

from seed_multimodal.device import choose_device


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


def request_body(kind: str, number: int, image: Image.Image) -> bytes:
    """A request of `/generate`."""
    if kind == "draw":
        return json.dumps({"text": "USER: draw a fish\nASSISTANT:", "images": [], "force_boi": True, "seed": number,
                           "max_new_tokens": 40}).encode()
    file = io.BytesIO()
    image.save(file, "PNG")
    return json.dumps({"text": "USER: <image>Describe the image.\nASSISTANT:", "max_new_tokens": 32,
                       "images": [base64.b64encode(file.getvalue()).decode()]}).encode()


def send(port: int, body: bytes) -> float:
    """Seconds of one request; raises `HTTPError` for another status than 200."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", body, {"Content-Type": "application/json"})
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as answer:
        answer.read()
    return time.perf_counter() - start


def run(options: argparse.Namespace) -> None:
    """Time each kind of request with each number of clients."""
    runtime = choose_device(options.device, options.dtype, log=None)
    with Server(options.model, str(runtime.device), "--dtype", options.dtype) as server:
        numbers, images = itertools.count(), itertools.cycle(input_images(256))
        for kind in ("describe", "draw"):
            plain = 0.0
            for clients in (1, *options.clients):
                count = options.requests * (1 if clients == 1 else 2)
                bodies = [request_body(kind, next(numbers), next(images)) for _ in range(count + clients)]
                with ThreadPoolExecutor(clients) as pool:
                    list(pool.map(lambda body: send(server.port, body), bodies[count:]))  # warm-up
                    start = time.perf_counter()
                    seconds = sorted(pool.map(lambda body: send(server.port, body), bodies[:count]))
                    rate = count / (time.perf_counter() - start)
                plain = plain or rate
                print_line("serving", runtime.device, {
                    "variant": "plain" if clients == 1 else "clients", "request": kind, "clients": clients,
                    "model": options.model, "device": str(runtime.device)}, {
                    "requests_per_second": rounded(rate), "median_seconds": rounded(seconds[len(seconds) // 2]),
                    "p95_seconds": rounded(seconds[int(0.95 * (count - 1))]), "times_plain": round(rate / plain, 2)})


if __name__ == "__main__":
    parser = base_parser(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16], help="numbers of clients, beside one")
    parser.add_argument("--requests", type=int, default=32, help="of one client; several send twice as many together")
    start(run, parser)
