"""Time the server: answers per second, latency and time to the first piece, in JSON lines.

    python benchmarks/serving.py                             nano; 1, 4, 8, 16 and 32 clients
    python benchmarks/serving.py --device cuda --model pretrained/seed_x_i --clients 1 8 32

Starts the server on a free port; asks `/v1/chat/completions` for streams: `describe` and `ask` (a
short question) send an image that was not sent before, `draw` a text that is answered with an
image.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
from shared import ROOT, input_images, print_line, rounded, start, system_parser

from seed_multimodal.device import choose_device
from seed_multimodal.images.io import image_to_base64
from seed_multimodal.language.prompts import DESCRIBE_PROMPT, QA_SUFFIX

KINDS = ("describe", "ask", "draw")


@contextlib.contextmanager
def server(model: str, device: str, dtype: str) -> Iterator[str]:
    """Run the server as a process; the address of its chat route."""
    program = f"{shlex.quote(sys.executable)} {ROOT}/gradio_demo/seed_llama_flask.py --port 0"
    devices = f"--llm_device {device} --tokenizer_device {device} --dtype {dtype}"
    command = f"{program} --system {shlex.quote(model)} {devices}"
    process = subprocess.Popen(shlex.split(command), stdout=subprocess.PIPE, text=True, bufsize=1)
    lines: Any = process.stdout
    address = next((line for line in lines if "answering at" in line), "")
    if not address:
        raise SystemExit("The server did not start.")
    port = int(address.split(":")[2].partition("/")[0])
    # A full pipe would stop the server.
    threading.Thread(target=collections.deque, args=(lines, 0), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        process.terminate()
        process.wait(30)


def bodies(kind: str) -> Iterator[dict[str, Any]]:
    """Requests of one kind, each with its own image or seed."""
    for index, image in enumerate(itertools.cycle(input_images(256))):
        if kind == "draw":
            content: Any = "Please draw a fish."
            options = {"force_image": True, "seed": index, "max_tokens": 40}
        else:
            url = f"data:image/png;base64,{image_to_base64(image.rotate(index % 360))}"
            question = DESCRIBE_PROMPT if kind == "describe" else f"What is on the left?{QA_SUFFIX}"
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": question},
            ]
            options = {"max_tokens": 256}
        yield {"messages": [{"role": "user", "content": content}], "stream": True, **options}


def send(address: str, body: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first piece and to the last. Raises HTTPError, RuntimeError."""
    begin = time.perf_counter()
    with requests.post(address, json=body, stream=True, timeout=600) as response:
        response.raise_for_status()
        pieces = response.iter_lines()
        line = next(pieces)
        first = time.perf_counter() - begin
        for line in pieces:
            if b'{"error"' in line:
                raise RuntimeError(line.decode())
    return first, time.perf_counter() - begin


def send_all(address: str, requests_to_send: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    """Rate and percentiles in seconds."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = [*pool.map(lambda body: send(address, body), requests_to_send)]
    seconds = time.perf_counter() - begin
    first = sorted(result[0] for result in times)
    last = sorted(result[1] for result in times)
    percentiles = {f"p{part}": rounded(last[len(last) * part // 100]) for part in (50, 95, 99)}
    return {
        "requests_per_second": rounded(len(times) / seconds),
        "first_p50": rounded(first[len(first) // 2]),
        **percentiles,
    }


def run(options: argparse.Namespace) -> None:
    """Time each kind of request with each number of clients."""
    runtime = choose_device(options.device, options.dtype, log=None)
    with server(options.model, str(runtime.device), options.dtype) as address:
        for kind in KINDS:
            source = bodies(kind)
            plain = None
            for clients in options.clients:
                send_all(address, [*itertools.islice(source, clients)], clients)  # warm-up
                count = max(options.requests, 4 * clients)
                results = send_all(address, [*itertools.islice(source, count)], clients)
                plain = plain or results["requests_per_second"]
                results["times_plain"] = round(results["requests_per_second"] / plain, 2)
                variant = "plain" if clients == options.clients[0] else "clients"
                settings = {"variant": variant, "request": kind, "clients": clients}
                print_line("serving", options, runtime, settings, results)


if __name__ == "__main__":
    parser = system_parser(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument(
        "--requests",
        type=int,
        default=32,
        help="for each number of clients, and four of each client",
    )
    start(run, parser)
