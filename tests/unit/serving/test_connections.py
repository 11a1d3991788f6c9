"""The server below its routes, over sockets: tokens of any letters, bodies and answers of any size
without a temporary folder, clients that close a half of their connection.
"""

import json
import resource
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import requests
from random_images import noise
from served import CHAT, HI, Running, user

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import image_to_bytes
from seed_multimodal.serving.app import create_app, listen

DRAW = "/v1/images/generations"
ASK = {"text": HI, "images": [], "max_new_tokens": 4}
STREAM = {"messages": [user("hi")], "max_tokens": 4, "stream": True}


@pytest.fixture(scope="module")
def running(tiny: Any) -> Running:
    return Running(tiny)


def request(body: dict[str, Any] | None, path: str = "/generate", *headers: str) -> bytes:
    """A request as it is sent; a GET without a body."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: localhost", *headers]
    lines += ["Content-Type: application/json"] * (body is not None)
    if "Transfer-Encoding: chunked" in headers:
        content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
    else:
        lines.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*lines, "", ""]).encode() + content


def exchange(running: Running, sent: bytes, half_closed: bool = True) -> bytes:
    """What the server sends until it closes the connection."""
    with running.connect() as sock:
        sock.sendall(sent)
        if half_closed:
            sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


# ---- the ends of a connection


@pytest.mark.parametrize(
    "sent, answers, end",
    [
        (request(None, "/health"), 1, b"}\n"),
        (request(ASK), 1, b"}\n"),
        (request(ASK, "/generate", "Transfer-Encoding: chunked"), 1, b"}\n"),
        (request(STREAM, CHAT), 1, b"data: [DONE]\n\n\r\n0\r\n\r\n"),
        (request(ASK) * 3, 3, b"}\n"),
    ],
    ids=["GET", "POST", "chunked", "stream", "pipelined"],
)
def test_clients_that_close_their_half_get_the_answers(running, sent, answers, end):
    # As `nc -N` and socat do at the end of their input.
    received = exchange(running, sent)
    assert received.count(b"HTTP/1.1 200 OK") == answers and received.endswith(end)


def test_bodies_that_are_too_large_are_refused_before_they_are_sent(running):
    large = b"Content-Length: 1%b" % (b"0" * 12)
    sent = request(None, "/generate", "Expect: 100-continue").replace(b"Content-Length: 0", large)
    answer = exchange(running, sent, half_closed=False)
    assert answer.startswith(b"HTTP/1.1 413")


# ---- sizes


def test_large_requests_and_answers_need_no_temporary_folder(running, monkeypatch):
    # Of a container whose /tmp is full or read-only.
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    with pytest.raises(OSError, match="null"):
        tempfile.TemporaryFile()
    large = image_to_bytes(noise(0).resize((700, 700)).effect_spread(9))
    assert len(large) > 1 << 20
    body = {"messages": [user(noise(0).resize((700, 700)).effect_spread(9), "What is it?")]}
    chat = requests.post(f"{running.root}{CHAT}", json={**body, "max_tokens": 4}, timeout=60)
    form = {"prompt": "Make it green."}
    files = {"image": ("a.png", large)}
    edit = requests.post(f"{running.root}/v1/images/edits", form, files=files, timeout=60)
    drawn = {"prompt": "a fish", "n": 8, "size": "1024x1024"}
    draw = requests.post(f"{running.root}{DRAW}", json=drawn, timeout=60)
    assert [chat.status_code, edit.status_code, draw.status_code] == [200] * 3
    assert len(draw.content) > 1 << 20 and len(draw.json()["data"]) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_requests_for_which_memory_is_short_are_refused_with_a_sentence(running):
    body = b" " * (60 << 20)
    headers = {"Content-Type": "application/json"}
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (40 << 20), before[1]))
    try:
        refused = requests.post(running.address, data=body, headers=headers, timeout=60)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert refused.status_code == 503 and "out of memory" in refused.json()["error"]
    assert running.ask().status_code == 200


# ---- tokens


@pytest.mark.parametrize("token", ["abc=def", "YWJj==", "a b,c", "pässword", "voilà", "秘密", '"'])
def test_tokens_of_any_letters_fit(tiny, token):
    running = Running(tiny, token=token)
    wrong = [b"", token.encode()[:-1], token.encode() + b"x", b"??", token.encode("utf-16")]
    for sent in [token.encode(), *([token.encode("latin-1")] if token < "\u0100" else [])]:
        for scheme, status in (
            (b"Bearer ", 200),
            (b"bearer   ", 200),
            (b"Basic ", 401),
            (b"", 401),
        ):
            get = requests.get(f"{running.root}/ready", headers={"Authorization": scheme + sent})
            assert get.status_code == status, (scheme, sent)
    for sent in wrong:
        if b"\0" not in sent and b"\n" not in sent:
            get = requests.get(
                f"{running.root}/ready", headers={"Authorization": b"Bearer " + sent}
            )
            assert get.status_code == 401, sent


@pytest.mark.parametrize("token", [" abc", "abc\n", "a\tb", "a\0", "abc\u00a0", "\ufeffabc"])
def test_tokens_that_no_header_holds_are_refused_at_start(tiny, token):
    for start in (lambda: create_app(tiny, token=token), lambda: listen("127.0.0.1", 0, token)):
        with pytest.raises(ConfigError, match="control characters"):
            start()
