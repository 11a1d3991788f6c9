"""The server of the shipped systems under faults: equal answers, no 5xx, restarts."""

import collections
import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from repository import NANO, ROOT
from served import CHAT, read, serving, user
from systems import load

from seed_multimodal.images.io import image_to_base64

pytestmark = [pytest.mark.nightly, pytest.mark.process, pytest.mark.timeout(900)]
PLAIN = [str(ROOT / "gradio_demo" / "seed_llama_flask.py")]
FAULTY = [str(ROOT / "tests" / "support" / "faulty_server.py"), "0.02"]
SYSTEMS = [NANO, NANO.with_name("nano-x"), NANO.with_name("nano-lavit")]
HANG_SECONDS = 120
RESTART_SECONDS = 40  # on two busy cores; most of it are imports


@contextlib.contextmanager
def server(program: list[str], *flags: str, port=0) -> Iterator[tuple[str, Any]]:
    """A server as a process; its address and the process."""
    devices = "--llm_device cpu --tokenizer_device cpu".split()
    with serving([sys.executable, *program, "--port", str(port), *devices, *flags]) as running:
        address, process = running
        yield address.removesuffix("/generate"), process


def image(seed) -> Image.Image:
    """A crop of the committed images."""
    files = sorted((ROOT / "images").glob("*.png"))
    picture = Image.open(files[seed % len(files)]).convert("RGB")
    return picture.crop((seed % 7, seed % 5, picture.width - seed % 3, picture.height))


def requests_of(seed) -> list[tuple[str, dict]]:
    """One request of each kind: route and body."""
    picture = image(seed)
    sampled = {"temperature": 0.7, "top_p": 0.9, "seed": seed, "max_tokens": 20}
    ask = [user(picture, "What is on the left?")]
    draw = [{"role": "user", "content": "Please draw a fish."}]
    text = "USER: <image>What is it?\nASSISTANT:"
    return [
        (CHAT, {"messages": ask, **sampled}),
        (CHAT, {"messages": draw, "force_image": True, "seed": seed, "max_tokens": 40}),
        ("/generate", {"text": text, "images": [image_to_base64(picture)], "seed": seed}),
        ("/v1/images/generations", {"prompt": "a red fox on a hill", "seed": seed}),
        ("/v1/images/tokens", {"images": [image_to_base64(picture)]}),
    ]


def content_of(response: requests.Response) -> dict:
    """The answer without what differs each time."""
    body = response.json()
    return {name: value for name, value in body.items() if name not in ("id", "created")}


def same(answer, expected) -> bool:
    """Equal but for rounding of pixels: an image may be drawn in a batch."""
    if isinstance(expected, dict):
        return answer.keys() == expected.keys() and all(
            same(answer[name], expected[name]) for name in expected
        )
    if isinstance(expected, list):
        return len(answer) == len(expected) and all(map(same, answer, expected))
    if isinstance(expected, str) and "iVBORw0KGgo" in expected:
        pixels = np.asarray(read(answer), np.int16)
        return abs(pixels - np.asarray(read(expected), np.int16)).max() <= 1
    return answer == expected


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda folder: folder.name)
def test_answers_under_faults_equal_those_computed_alone(system):
    # A request that fails, leaves or is killed must not change another one's answer.
    jobs = [job for seed in range(3) for job in requests_of(seed)]
    with server(PLAIN, "--system", str(system)) as (root, _):
        alone = [requests.post(root + path, json=body, timeout=HANG_SECONDS) for path, body in jobs]
    assert {response.status_code for response in alone} <= {200, 400}
    outcomes = collections.Counter[str]()
    problems = []

    def client(root: str, seed, until: float):
        """One request after another; some leave before their answer."""
        rng = random.Random(seed)
        while time.monotonic() < until:
            index = rng.randrange(len(jobs))
            path, body = jobs[index]
            leaves = rng.random() < 0.1
            try:
                response = requests.post(
                    root + path, json=body, timeout=rng.random() if leaves else HANG_SECONDS
                )
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                outcomes["lost"] += 1
                time.sleep(0.5)
                continue
            except requests.Timeout:
                outcomes["left" if leaves else "hang"] += 1
                continue
            if response.status_code in (429, 503):
                outcomes["busy or out of memory"] += 1
            elif response.status_code != alone[index].status_code:
                problems.append(f"{path}: {response.status_code} {response.text[:300]}")
            elif not same(content_of(response), content_of(alone[index])):
                problems.append(f"{path}: {response.text[:300]}, not {alone[index].text[:300]}")
            else:
                outcomes["equal"] += 1

    # 1. Out of memory at random, and clients that leave; then SIGKILL under load.
    with server(FAULTY, "--system", str(system)) as (root, process):
        port = int(root.rpartition(":")[2])
        with ThreadPoolExecutor(8) as pool:
            clients = [pool.submit(client, root, seed, time.monotonic() + 40) for seed in range(8)]
            time.sleep(35)
            process.send_signal(signal.SIGKILL)
            for future in clients:
                future.result()
    assert outcomes["lost"] > 0

    # 2. A new server at the same port answers as before.
    killed = time.monotonic()
    with server(PLAIN, "--system", str(system), port=port) as (root, _):
        assert time.monotonic() - killed < RESTART_SECONDS
        client(root, 99, time.monotonic() + 5)
        assert requests.get(f"{root}/health", timeout=10).status_code == 200
    assert not problems, problems[:5]
    assert outcomes["hang"] == 0 and outcomes["equal"] > 20, outcomes
    assert outcomes["busy or out of memory"] > 0, outcomes


def test_schemathesis_finds_no_fault():
    # Requests out of the server's own OpenAPI document, valid and not.
    with server(PLAIN, "--system", str(NANO), "--max_seconds", "5") as (root, _):
        checks = (
            "not_a_server_error,status_code_conformance,content_type_conformance,"
            "response_schema_conformance"
        )
        options = f"--phases coverage,fuzzing --max-examples 40 --seed 0 --checks {checks}"
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{root}/openapi.json"]
            + options.split()
            + ["--request-timeout", "60", "--continue-on-failure", "--no-color"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-8000:]


def hostile_bodies() -> Iterator[bytes]:
    """Decompression bombs, and more than a request may have: bodies of `/generate`."""
    for mode in ("1", "P"):
        bomb = image_to_base64(Image.new(mode, (5600, 5600)))
        yield b'{"text": "<image>", "images": ["%s"], "max_new_tokens": 4}' % bomb.encode()
    yield b'{"images": [[' + b"1," * 4_000_000 + b"1]]}"
    yield b" " * (66 << 20)


def test_hostile_bodies_are_refused_and_visitors_answered():
    # Damaged files: test_fuzz.py; clients that stall: unit/serving/test_server.py.
    with server(PLAIN, "--system", str(NANO), "--max_megapixels", "30") as (root, process):
        url = f"{root}/generate"
        headers = {"Content-Type": "application/json"}
        question = {"text": "USER: hi\nASSISTANT:", "images": [], "max_new_tokens": 4}
        for body in hostile_bodies():
            with contextlib.suppress(requests.ConnectionError):  # closed before the body's end
                answer = requests.post(url, data=body, headers=headers, timeout=HANG_SECONDS)
                assert 400 <= answer.status_code < 500, answer.text[:300]
            assert requests.post(url, json=question, timeout=HANG_SECONDS).status_code == 200
        assert process.poll() is None


def test_conversations_together_equal_those_alone():
    # Continuous batching: other requests in the batch, streams and cancelled ones change nothing.
    system = load(NANO, load_decoder=False)
    jobs = []
    for seed in range(120):
        rng = random.Random(seed)
        options = {"max_new_tokens": rng.choice((5, 20, 60))}
        if rng.random() < 0.5:
            options |= {"temperature": rng.choice((0.7, 1.5)), "top_p": 0.9, "seed": seed}
        if rng.random() < 0.1:
            options |= {"repetition_penalty": 1.2}
        history = [
            {"role": "user", "content": ["Is it night?"]},
            {"role": "assistant", "content": "Yes."},
        ]
        content = [image(seed), "What is on the left?"][rng.random() < 0.2 :]
        last = {"role": "user", "content": content}
        jobs.append(([*history * rng.randrange(3), last], options))

    def answer(index) -> list[int] | None:
        """Ids: whole, streamed, or None of a cancelled answer."""
        messages, options = jobs[index]
        if index % 3 == 0:
            return list(system.chat(messages, **options).ids)
        events = system.chat(messages, stream=True, **options)
        if index % 5 == 0:
            next(events)
            events.close()
            return None
        *_, done = events
        return list(done["answer"].ids)

    with ThreadPoolExecutor(8) as pool:
        together = [*pool.map(answer, range(len(jobs)))]
    fresh = load(NANO, load_decoder=False)
    for ids, (messages, options) in zip(together, jobs, strict=True):
        assert ids is None or ids == list(fresh.chat(messages, **options).ids)
    assert system.engine.n_decoding == 0 and not system.engine.reading
