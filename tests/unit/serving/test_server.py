"""The real server under waitress: lost, slow and too many clients, bodies over the limit, the end by SIGTERM."""

from __future__ import annotations

import base64
import io
import json
import re
import runpy
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import warm_python
from PIL import Image

from seed_multimodal.errors import ConfigError
from seed_multimodal.serving import wsgi
from seed_multimodal.serving.codes_backend import CodesSystem
from seed_multimodal.serving.flask_app import create_app, serve
from seed_multimodal.serving.schema import Limits

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.process


class Slow(CodesSystem):
    """Answers when `gate` opens; remembers which texts reached the model."""

    def __init__(self, system: Any) -> None:
        super().__init__(system)
        self.gate = threading.Event()
        self.reached: list[str] = []
        self.opened: list[str] = []

    def generate(self, asked: Any, request: Any) -> list[int]:
        self.reached.append(request.text)
        while not self.gate.wait(0.02):
            if request.gone():
                return super().generate(asked, request)  # the first token notices it
        return [self.tokenizer.eos_id]


class Running:
    """A server in a thread of this process."""

    def __init__(self, backend: Any, **limits: int) -> None:
        said: list[str] = []
        app = create_app(backend, limits=Limits(**limits))
        threading.Thread(target=serve, args=(app,), kwargs={"port": 0, "log": said.append}, daemon=True).start()
        while not said:
            time.sleep(0.01)
        self.address = said[-1].split("answering at ")[1].split()[0]
        self.port = int(self.address.split(":")[2].split("/")[0])
        self.engine = app.extensions["seed_engine"]

    def ask(self, text: str, **more: Any) -> requests.Response:
        return requests.post(self.address, json={"text": text, "images": [], "max_new_tokens": 4, **more}, timeout=60)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def send_and_leave(self, text: str) -> None:
        body = json.dumps({"text": text, "images": [], "max_new_tokens": 900}).encode()
        with self.connect() as sock:
            sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                         b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            time.sleep(0.05)

    def wait_until(self, condition: Any) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture()
def slow(tiny) -> Iterator[tuple[Slow, Running]]:
    backend = Slow(tiny)
    running = Running(backend, max_waiting=3)
    yield backend, running
    backend.gate.set()


def test_clients_that_left_are_dropped_in_the_line_and_at_the_model(slow) -> None:
    backend, running = slow
    running.send_and_leave("at the model")
    running.wait_until(lambda: running.engine.health()["waiting"] == 0 and not running.engine.health()["busy"])
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.ask, "patient")
        running.wait_until(lambda: "patient" in backend.reached)
        for number in range(3):
            running.send_and_leave(f"in the line {number}")
        running.wait_until(lambda: running.engine.health()["waiting"] == 0)
        backend.gate.set()
        assert first.result().status_code == 200
    assert running.ask("after").status_code == 200
    assert backend.reached == ["at the model", "patient", "after"]


def test_too_many_requests_are_sent_away_with_a_time(slow) -> None:
    backend, running = slow
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(running.ask, str(number)) for number in range(4)]
        running.wait_until(lambda: running.engine.health()["waiting"] == 3)
        away = running.ask("one more")
        assert away.status_code == 429 and int(away.headers["Retry-After"]) >= 1
        assert "3 requests wait already" in away.json()["error"]
        assert requests.get(f"http://127.0.0.1:{running.port}/health", timeout=10).json()["waiting"] == 3
        backend.gate.set()
        assert [one.result().status_code for one in waiting] == [200] * 4


def test_half_sent_bodies_hold_no_thread_and_are_closed(tiny, monkeypatch) -> None:
    monkeypatch.setattr(wsgi, "PATIENCE", 2.0)
    running = Running(CodesSystem(tiny))
    before = threading.active_count()
    held = [running.connect() for _ in range(60)]
    for number, sock in enumerate(held):
        sock.sendall([b"POST /generate HTTP/1.1\r\nContent-Length: 50000\r\n\r\n" + b"x" * 20_000, b"GET / HT",
                      b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", b""][number % 4])
    began = time.monotonic()
    assert running.ask("USER: hi\nASSISTANT:").status_code == 200 and time.monotonic() - began < 2
    assert threading.active_count() == before
    for sock in held:
        assert sock.recv(1) == b""  # within 30 s, by the server
        sock.close()
    dribbling = running.connect()
    with pytest.raises(OSError):
        for _ in range(100):  # a letter now and then is no request
            dribbling.sendall(b"G")
            time.sleep(0.1)


def test_a_chunked_body_over_the_limit_gets_413_and_a_shorter_one_its_answer(tiny) -> None:
    running = Running(CodesSystem(tiny), max_body_bytes=1 << 20)
    headers = {"Content-Type": "application/json"}

    def pieces(count: int) -> Iterator[bytes]:
        yield b'{"text": "USER: hi\\nASSISTANT:", "images": [], "max_new_tokens": 3'
        for _ in range(count):
            yield b" " * 65_536
        yield b"}"

    for count, status in ((0, 200), (3, 200), (40, 413), (200, 413)):
        answer = requests.post(running.address, data=pieces(count), headers=headers, timeout=60)
        assert answer.status_code == status
        if status == 413:
            assert answer.json()["error"] == "The request body is larger than 1 MiB."
            assert answer.json()["error_msg"] == [answer.json()["error"]]
    assert requests.post(running.address, data=b" " * (3 << 20), headers=headers, timeout=60).status_code == 413
    assert requests.get(running.address, headers={"X": "x" * 20_000}, timeout=60).status_code == 431


@pytest.mark.parametrize("request_", [
    b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * 40_000,
    b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX: " + b"a" * 40_000,
    b"POST /generate HTTP/1.1\r\nContent-Length: " + b"9" * 6000 + b"\r\n\r\n",
], ids=["line of a chunk", "trailer", "length of 6000 digits"])
def test_endless_lines_of_http_are_refused(tiny, request_) -> None:
    with Running(CodesSystem(tiny)).connect() as sock:
        sock.settimeout(5)
        sock.sendall(request_)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def shown(*images: Image.Image, kind: str = "PNG") -> list[str]:
    files = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, kind)
        files.append(base64.b64encode(buffer.getvalue()).decode())
    return files


@pytest.mark.parametrize(("text", "pictures", "words"), [
    ("<image>" * 3, [Image.new("1", (700, 700))] * 3, r"up to images\[2\] have 1.5 megapixels; a request may have 1."),
    ("<image>", [Image.new("1", (1100, 1000))], r"images\[0\]: refused unread, because its header claims 1100x1000"),
    ("<image>" + "word " * 3000, [Image.new("L", (9, 9))], "context"),
])
def test_nothing_is_decoded_for_a_request_that_is_refused(tiny, monkeypatch, text, pictures, words) -> None:
    from seed_multimodal.serving import engine

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(engine, "open_image", never)
    client = create_app(tiny, limits=Limits(max_image_pixels=1_000_000, max_request_pixels=1_000_000)).test_client()
    answer = client.post("/generate", json={"text": text, "images": shown(*pictures)})
    assert answer.status_code == 400 and re.search(words, answer.get_json()["error"])


def test_two_threads_decode_and_never_more_than_the_limit_of_pixels(tiny, monkeypatch) -> None:
    from seed_multimodal.serving import engine

    inside, most, lock = [0], [0], threading.Lock()
    read = engine.open_image

    def watched(*args: Any, **options: Any) -> Image.Image:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.05)
        try:
            return read(*args, **options)
        finally:
            with lock:
                inside[0] -= 1

    monkeypatch.setattr(engine, "open_image", watched)
    app = create_app(tiny, limits=Limits(max_image_pixels=90_000, max_request_pixels=900_000,
                                         max_decoding_pixels=250_000))
    for side, threads in ((30, 2), (299, 1)):  # small ones: two threads; 8 bytes for each of 89,401 pixels: one
        most[0] = 0
        body = {"text": "<image>" * 2, "images": shown(*[Image.new("RGB", (side, side))] * 2), "max_new_tokens": 1}
        with ThreadPoolExecutor(6) as pool:
            done = list(pool.map(lambda _, body=body: app.test_client().post("/generate", json=body), range(6)))
        assert {one.status_code for one in done} == {200} and most[0] == threads


@pytest.mark.slow
def test_sigterm_ends_the_program_at_once_while_it_works(tiny_folder) -> None:
    program = subprocess.Popen(
        [warm_python.PYTHON, str(ROOT / "gradio_demo" / "seed_llama_flask.py"), "--system", str(tiny_folder), "--port",
         "0", "--llm_device", "cpu", "--tokenizer_device", "cpu"], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    line = next(line for line in program.stdout if "answering at" in line)
    address = line.split("answering at ")[1].split()[0]
    body = {"text": "x", "images": [], "max_new_tokens": 2048, "num_beams": 8, "temperature": 5.0, "top_p": 1.0}
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(requests.post, address, json=body, timeout=60) for _ in range(3)]
        time.sleep(0.5)
        program.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert program.wait(20) == 0 and time.monotonic() - began < 6
        for one in asked:
            assert one.exception() is not None or one.result().status_code in (200, 503)


@pytest.mark.slow
def test_hostile_traffic_in_small(tiny_folder) -> None:
    done = subprocess.run(
        [warm_python.PYTHON, str(ROOT / "benchmarks" / "hostile.py"), "--model", str(tiny_folder), "--megapixels", "1",
         "--half-sent", "40", "--stall-seconds", "3"], capture_output=True, text=True, timeout=280)
    results = json.loads(done.stdout)["results"]
    assert done.returncode == 0, done.stderr
    assert results["faults"] == [] and results["requests"] > 200
    assert results["peak_mb_above_idle"] < 200


def test_a_system_and_a_part_of_it_are_not_named_together(tiny_folder: Path) -> None:
    program = runpy.run_path(str(ROOT / "gradio_demo" / "seed_llama_flask.py"))
    args = program["build_parser"]().parse_args(["--system", str(tiny_folder), "--model", "a.yaml", "--port", "0"])
    args.debug = False
    with pytest.raises(ConfigError, match="--system names all that is served, --model a part of it"):
        program["run"](args)
