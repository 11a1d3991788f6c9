"""The server under load and faults: clients that leave, limits, metrics, tokens, SIGTERM, and
OpenAI's own client over a socket.
"""

import io
import json
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from random_images import noise
from repository import ROOT
from served import (
    CHAT,
    HI,
    Running,
    events,
    figures,
    read,
    serving,
    user,
)
from systems import load
from waiting import wait_until
from warm_processes import PYTHON
from yaml_tables import read_tables

from seed_multimodal.images.io import image_to_bytes
from seed_multimodal.serving.app import create_app, listen, loading

PROGRAM = str(ROOT / "gradio_demo" / "seed_llama_flask.py")
TOKEN = "a secret of nobody"
JSON = {"Content-Type": "application/json"}
BODY = {"messages": [user("hi")], "max_tokens": 4, "temperature": 0}


# ---- requests that wait or leave


class Gate:
    """Holds the language model before each of its passes until `open` is set."""

    def __init__(self, llm):
        self.open = threading.Event()
        self.passes = 0
        self.hook = llm.get_decoder().register_forward_pre_hook(lambda *_: self.hold())

    def hold(self):
        self.passes += 1
        self.open.wait(30)


@pytest.fixture
def gate(tiny) -> Iterator[Gate]:
    gate = Gate(tiny.llm)
    yield gate
    gate.open.set()
    gate.hook.remove()


@pytest.mark.slow
def test_clients_that_left_are_dropped(tiny, gate: Gate):
    # While they wait, and while they are answered.
    running = Running(tiny, max_running=1, max_waiting=3)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.ask)
        wait_until(lambda: gate.passes == 1)
        for _ in range(3):
            running.send_and_leave()
        wait_until(lambda: running.health()["waiting"] == 0)
        gate.open.set()
        assert first.result().status_code == 200
    gate.open.clear()
    gate.passes = 0
    running.send_and_leave()
    wait_until(lambda: gate.passes == 1)
    time.sleep(0.2)
    gate.open.set()
    wait_until(lambda: running.health()["running"] == 0)
    assert gate.passes < 100  # 400 tokens were asked for
    assert running.ask().status_code == 200 and running.health()["answered"] == 2


def test_too_many_requests_are_refused(tiny, gate: Gate):
    # Clients are told to come back, rather than left waiting without an answer.
    running = Running(tiny, max_running=1, max_waiting=3)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(running.ask) for _ in range(4)]
        wait_until(lambda: running.health()["waiting"] == 3)
        refused = running.ask()
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert running.health() == {"status": "ok", "running": 1, "waiting": 3, "answered": 0}
        gate.open.set()
        assert [ended.result().status_code for ended in waiting] == [200] * 4


@pytest.mark.slow
def test_health_and_seconds_include_both_queues(client_of, tiny_folder):
    # A system whose KV cache has a single row, behind a server of two requests at once.
    system = load(tiny_folder, load_decoder=False, max_running=1)
    gate = Gate(system.llm)
    client = client_of(system, max_running=2)
    with ThreadPoolExecutor(3) as pool:
        asks = [pool.submit(client.application.test_client().post, CHAT, json=BODY) for _ in "123"]
        wait_until(lambda: client.get("/health").json["waiting"] == 2)
        assert client.get("/health").json["running"] == 1
        assert [figures(client)[f"seed_{name}"] for name in ("running", "waiting")] == [1, 2]
        time.sleep(0.5)
        gate.open.set()
        assert [ask.result(20).status_code for ask in asks] == [200] * 3
    assert client.get("/health").json == {"status": "ok", "running": 0, "waiting": 0, "answered": 3}
    measured = figures(client)
    assert measured[f'seed_request_seconds_sum{{route="{CHAT}"}}'] >= 3 * 0.5
    assert measured["seed_first_token_seconds_sum"] >= 3 * 0.5
    assert measured["seed_first_token_seconds_count"] == 3


def test_half_sent_and_oversized_requests_do_not_block_others(tiny):
    running = Running(tiny, max_body_bytes=1 << 20)
    beginnings = [
        b"POST /generate HTTP/1.1\r\nContent-Length: 50000\r\n\r\n" + b"x" * 20_000,
        b"GET / HT",
        b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"",
    ]
    sockets = [running.connect() for _ in range(40)]
    for index, sock in enumerate(sockets):
        sock.sendall(beginnings[index % 4])

    def chunks(count):
        yield b'{"text": "USER: hi\\nASSISTANT:", "images": [], "max_new_tokens": 3'
        yield from [b" " * 65_536] * count
        yield b"}"

    for count, status in ((3, 200), (20, 413)):
        answer = requests.post(running.address, data=chunks(count), headers=JSON, timeout=60)
        assert answer.status_code == status
    assert running.ask().status_code == 200
    for sock in sockets:
        sock.close()


@pytest.mark.slow
@pytest.mark.parametrize("fits", [False, True])
def test_health_answers_while_hostile_texts_are_read(fits):
    # One message of 32,000 letters held the whole server for two minutes.
    system = load("nano", load_decoder=False)
    if fits:  # as by a model with a longer context
        system.family.max_characters = sys.maxsize
    running = Running(system)
    pieces = ("x", "\u0301", "“", "</", "a ")
    texts = [f"a fox {(piece * 31_000)[:31_000]} and a dog" for piece in pieces]
    waits = []
    before = time.process_time()
    with ThreadPoolExecutor(1) as pool:
        bodies = [{"messages": [user(text)]} for text in texts]
        posts = [pool.submit(requests.post, running.root + CHAT, json=body) for body in bodies]
        while not all(post.done() for post in posts) or len(waits) < 20:
            start = time.monotonic()
            running.health()
            waits.append(time.monotonic() - start)
    assert time.process_time() - before < 2 * len(posts)
    assert sum(wait > 0.2 for wait in waits) <= len(waits) / 10
    for post in posts:
        answer = post.result()
        unit = "tokens" if fits else "characters"
        assert answer.status_code == 400 and unit in answer.json()["error"]["message"]


# ---- answers that take too long, or fail


def test_late_answers_are_cut_off(client_of, tiny):
    # What is written so far is sent; an unfinished image is not.
    client = client_of(tiny, seconds=1e-5)
    answer = client.post(CHAT, json={**BODY, "max_tokens": 2048}).json["choices"][0]
    assert answer["finish_reason"] == "length" and len(answer["message"]["notes"]) == 1
    for route, body in (("generations", {"prompt": "a fish"}), ("tokens", {"codes": [[0] * 32]})):
        assert client.post(f"/v1/images/{route}", json=body).status_code == 503
    assert figures(client)['seed_request_seconds_count{route="/v1/images/generations"}'] == 1


@pytest.mark.parametrize("error, status", [(RuntimeError, 500), (MemoryError, 503)])
def test_faults_hide_their_details_and_are_counted(client_of, tiny, caplog, error, status):
    # Also in a stream, where the error is the last event.
    def fail(*_):
        raise error("secret path /home/me")

    client = client_of(tiny)
    draw = {"messages": [user("Draw.")], "force_image": True}
    hook = tiny.images.decoder.vae.decoder.register_forward_hook(fail)
    try:
        answer = client.post("/generate", json={"text": HI, "images": [], "force_boi": True})
        streamed = client.post(CHAT, json={**draw, "stream": True})
        last = events(streamed)[-1]
    finally:
        hook.remove()
    assert (answer.status_code, streamed.status_code) == (status, 200)
    assert last["error"]["type"] == "server_error"
    assert "secret" not in answer.json["error"] + last["error"]["message"]
    assert "secret path" in caplog.text
    counted = figures(client)
    for route in ("/generate", CHAT):
        assert counted[f'seed_requests_total{{route="{route}",status="{status}"}}'] == 1
        assert f'seed_requests_total{{route="{route}",status="200"}}' not in counted
    assert counted["seed_running"] == counted["seed_waiting"] == 0


# ---- metrics


def test_metrics_count_what_was_done(client_of, tiny):
    client = client_of(tiny)
    client.post("/v1/images/generations", json={"prompt": "a fish", "n": 2})
    usage = client.post(CHAT, json={**BODY, "messages": [user(noise(0))]}).json["usage"]
    counted = figures(client)
    assert counted['seed_images_total{kind="drawn"}'] == 2
    assert counted['seed_images_total{kind="read"}'] == 1
    for kind in ("prompt", "completion"):
        assert counted[f'seed_tokens_total{{kind="{kind}"}}'] == usage[f"{kind}_tokens"]
    assert counted[f'seed_requests_total{{route="{CHAT}",status="200"}}'] == 1


# ---- a process that serves for weeks


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_between_blocks_in_use_returns_to_the_system(tiny, monkeypatch):
    def anonymous_mb():
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) / 1000

    monkeypatch.setattr("seed_multimodal.serving.app.TRIM_SECONDS", 0.1)
    Running(tiny)
    blocks = [b"x" * 100_000 for _ in range(2000)]  # 200 MB
    full = anonymous_mb()
    lasting = blocks[::50]
    del blocks
    wait_until(lambda: anonymous_mb() < full - 100)
    assert len(lasting) == 40


# ---- OpenAI's client, and the token


@pytest.mark.slow
@pytest.mark.process  # the client asks the system what it runs on
def test_the_client_of_openai_reads_every_route(nano):
    from openai import OpenAI

    running = Running(nano, token=TOKEN)
    openai = OpenAI(base_url=f"{running.root}/v1", api_key=TOKEN, max_retries=0)
    assert [model.id for model in openai.models.list().data] == ["nano"]

    # 1. A conversation, whole and streamed; the answer is sent back as the client holds it.
    options = {"model": "any", "max_tokens": 40, "temperature": 0, "seed": 1}
    options["extra_body"] = {"force_image": True}
    complete = openai.chat.completions.create
    messages = [user("What is it?", noise(0))]
    completion = complete(**options, messages=messages)
    message = completion.choices[0].message
    assert len(message.model_extra["images"][0]["codes"]) == 32
    usage = {"include_usage": True}
    *chunks, last = complete(**options, messages=messages, stream=True, stream_options=usage)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == message.content
    assert (last.usage, last.choices) == (completion.usage, [])
    messages += [message.model_dump(exclude_none=True), user("And now?")]
    assert complete(**options, messages=messages).usage.prompt_tokens > 64

    # 2. Images.
    drawn = openai.images.generate(prompt="a fish", n=2, response_format="b64_json")
    edited = openai.images.edit(
        image=[image_to_bytes(noise(0)), image_to_bytes(noise(1))], prompt="Mix them."
    )
    assert len([read(item.b64_json) for item in (*drawn.data, *edited.data)]) == 3
    events = [*openai.images.generate(prompt="a fish", stream=True, partial_images=1)]
    assert [type(event).__name__ for event in events] == [
        "ImageGenPartialImageEvent",
        "ImageGenCompletedEvent",
    ]

    # 3. Responses, whole and streamed; the answer is sent back as the client holds it.
    tool = {"type": "image_generation", "partial_images": 1}
    options = {"model": "any", "temperature": 0, "tools": [tool], "tool_choice": tool}
    request = {**options, "input": "Draw a fish.", "extra_body": {"seed": 1}}
    response = openai.responses.create(**request)
    with openai.responses.stream(**request) as stream:
        *events, last = stream
    kinds = {event.type for event in events}
    assert {"response.output_text.delta", "response.image_generation_call.partial_image"} <= kinds
    items = [item.model_dump() for item in last.response.output]
    assert last.response.output_text == response.output_text
    assert [item["type"] for item in items[:2]] == ["message", "image_generation_call"]
    # What nano compares before its answer is an item of its own.
    message = {"role": "user", "content": "Is there a dog?"}
    with openai.responses.stream(model="any", input=[message, *items, message]) as stream:
        *events, last = stream
    assert "response.reasoning_text.delta" in {event.type for event in events}
    assert last.response.output[0].content[0].text and last.response.output_text == "No."
    assert last.response.usage.output_tokens_details.reasoning_tokens > 3


def test_every_route_but_health_needs_the_token(tiny):
    client = create_app(tiny, token=TOKEN).test_client()
    paths = client.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json["paths"]
    for path in [*paths, "/elsewhere"]:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}):
            response = client.open(path, headers=headers)
            wanted = 200 if path == "/health" else 401
            assert response.status_code == wanted, path
    assert response.headers["WWW-Authenticate"] == "Bearer"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert client.get("/ready", headers=headers).json == {"ready": True}


def test_pages_of_allowed_origins_use_the_server(tiny):
    # A browser asks first, without the token; without the option it gets no permission.
    origin = "http://localhost:3000"
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-my-client"
    for origins, allowed in [
        ([], None),
        (["http://other"], None),
        ([origin], origin),
        ("*", origin),
    ]:
        client = create_app(tiny, token=TOKEN, origins=origins).test_client()
        preflight = client.options(CHAT, headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers.get("Access-Control-Allow-Origin") == allowed
        # Errors are read by the page, too.
        refused = client.post(CHAT, json={}, headers={"Origin": origin})
        assert refused.status_code == 401
        assert refused.headers.get("Access-Control-Allow-Origin") == allowed
    names = preflight.headers["Access-Control-Allow-Headers"].split(", ")
    assert names == asked["Access-Control-Request-Headers"].split(",")


@pytest.mark.parametrize("case", read_tables(__file__), ids=str)
def test_other_hosts_and_web_pages_are_refused_without_a_token(tiny, case):
    # By DNS rebinding, and by forms, for which browsers ask no permission.
    headers, status = case["headers"], case["status"]
    client = create_app(tiny, origins=case["origins"]).test_client()
    form = {"prompt": "Make it green.", "image": (io.BytesIO(image_to_bytes(noise(0))), "a.png")}
    assert client.post("/v1/images/edits", data=form, headers=headers).status_code == status
    assert client.get("/v1/models", headers=headers).status_code == status


# ---- the program


def test_requests_are_answered_while_the_system_is_loaded():
    # Health checks of containers would hang, and end the server before its weights are read.
    sock = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with loading(sock):
        health = requests.get(f"{url}/health", timeout=10)
        ready = requests.get(f"{url}/ready", timeout=10)
        chat = requests.post(f"{url}{CHAT}", data=b"x" * 2**22, timeout=10)
    assert (health.status_code, health.json()["status"]) == (503, "loading")
    assert (ready.status_code, ready.json()["ready"]) == (503, False)
    assert chat.status_code == 503 and "loading" in chat.json()["error"]["message"]
    sock.close()


def test_listen_on_a_taken_port_and_for_other_machines():
    # Before a model is loaded, which takes minutes; other machines need a token.
    from seed_multimodal.errors import ConfigError

    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    for address in (("127.0.0.1", port), ("0.0.0.0", 0)):
        with pytest.raises(ConfigError, match=address[0]):
            listen(*address)
    sock.close()
    listen("0.0.0.0", 0, "secret").close()


def program(folder, python: str = PYTHON) -> list[str]:
    flags = f"--system {folder} --llm_device cpu --tokenizer_device cpu --port 0"
    return [python, PROGRAM, *flags.split()]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_requests_for_which_memory_is_short_get_a_sentence(tiny_folder):
    # The limit is the program's, not that of this process, which has other tests.
    body = json.dumps({"text": HI, "images": [], "max_new_tokens": 4})
    before = resource.getrlimit(resource.RLIMIT_AS)
    answers = []
    with serving(program(tiny_folder, sys.executable)) as (address, process):
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
        short = (pages * resource.getpagesize() + (40 << 20), before[1])
        for limits, size in ((short, 60 << 20), (before, 0)):
            resource.prlimit(process.pid, resource.RLIMIT_AS, limits)
            data = body.ljust(size)
            answers.append(requests.post(address, data, headers=JSON, timeout=60))
    assert [answer.status_code for answer in answers] == [503, 200]
    assert "out of memory" in answers[0].json()["error"]


@pytest.mark.process
@pytest.mark.slow
def test_program_reads_its_token_and_ends_by_sigterm_while_it_works(tiny_folder, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    command = [*program(tiny_folder), "--token-file", str(tmp_path / "token")]
    body = {"text": HI, "images": [], "max_new_tokens": 2048, "num_beams": 8}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with serving(command) as (address, process), ThreadPoolExecutor(1) as pool:
        assert requests.post(address, json=body, timeout=60).status_code == 401
        pending = pool.submit(requests.post, address, json=body, headers=headers, timeout=60)
        wait_until(
            lambda: requests.get(f"{address.removesuffix('generate')}health").json()["running"]
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        # The answer is cut off, not awaited.
        assert pending.exception() is not None or pending.result().status_code == 503
