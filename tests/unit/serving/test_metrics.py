"""Metrics and health of the server: time in the queue, failed streams, requests that wait inside
the engine.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from seed_multimodal.models.seed.pipeline import SeedLlama
from seed_multimodal.serving.app import create_app
from seed_multimodal.serving.schema import Limits

ROUTE = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
WAIT = 0.5  # seconds


def figures(app: Any) -> dict[str, float]:
    lines = app.test_client().get("/metrics").get_data(as_text=True).splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


@pytest.mark.parametrize("stream", [False, True])
def test_seconds_include_the_queue(tiny: SeedLlama, stream):
    app = create_app(tiny, limits=Limits(max_running=1))
    backend = app.extensions["seed_backend"]
    with ThreadPoolExecutor(1) as pool:
        with backend.slot("/other", 0, lambda: False):
            ask = pool.submit(app.test_client().post, ROUTE, json={**BODY, "stream": stream})
            wait_until(lambda: backend.health()["waiting"] == 1)
            time.sleep(WAIT)
        assert ask.result(20).status_code == 200
        ask.result().get_data()
    measured = figures(app)
    assert measured[f'seed_request_seconds_count{{route="{ROUTE}"}}'] == 1
    assert measured[f'seed_request_seconds_sum{{route="{ROUTE}"}}'] >= WAIT
    assert measured["seed_first_token_seconds_count"] == 1
    assert measured["seed_first_token_seconds_sum"] >= WAIT


def test_seconds_include_answers_that_failed(tiny: SeedLlama):
    app = create_app(tiny, limits=Limits(seconds=1e-5))
    assert (
        app.test_client().post("/v1/images/generations", json={"prompt": "a fish"}).status_code
        == 503
    )
    assert figures(app)['seed_request_seconds_count{route="/v1/images/generations"}'] == 1


def test_stream_that_fails_later_is_counted_with_its_status(tiny: SeedLlama):
    """The third pass of the language model fails, behind the first text."""
    app = create_app(tiny)
    passes = 0

    def fail_at_third(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise RuntimeError("a defect")

    hook = tiny.llm.get_decoder().register_forward_pre_hook(fail_at_third)
    try:
        response = app.test_client().post(ROUTE, json={**BODY, "max_tokens": 8, "stream": True})
        events = response.get_data(as_text=True).split("\n\n")
    finally:
        hook.remove()
    assert response.status_code == 200
    assert json.loads(events[-3].removeprefix("data: "))["error"]["type"] == "server_error"
    measured = figures(app)
    assert measured[f'seed_requests_total{{route="{ROUTE}",status="500"}}'] == 1
    assert f'seed_requests_total{{route="{ROUTE}",status="200"}}' not in measured
    assert measured["seed_running"] == measured["seed_waiting"] == 0


@pytest.fixture
def single_row(tiny_folder: Path) -> SeedLlama:
    """A system whose KV cache has a single row."""
    return SeedLlama.from_pretrained(
        tiny_folder, device="cpu", log=None, load_decoder=False, max_running=1
    )


@pytest.fixture
def busy(single_row: SeedLlama) -> Iterator[threading.Event]:
    """The language model waits before each of its passes until the event is set."""
    opened = threading.Event()
    hook = single_row.llm.get_decoder().register_forward_pre_hook(
        lambda *_: opened.wait(20) and None
    )
    yield opened
    opened.set()
    hook.remove()


def test_waiting_includes_requests_inside_the_engine(single_row: SeedLlama, busy: threading.Event):
    app = create_app(single_row, limits=Limits(max_running=4))
    health = app.extensions["seed_backend"].health
    with ThreadPoolExecutor(3) as pool:
        asks = [pool.submit(app.test_client().post, ROUTE, json=BODY) for _ in range(3)]
        wait_until(lambda: single_row.engine.n_waiting == 2)
        assert (health()["running"], health()["waiting"]) == (1, 2)
        assert (figures(app)["seed_running"], figures(app)["seed_waiting"]) == (1, 2)
        busy.set()
        assert [ask.result(20).status_code for ask in asks] == [200] * 3
    assert (health()["running"], health()["waiting"], health()["answered"]) == (0, 0, 3)
