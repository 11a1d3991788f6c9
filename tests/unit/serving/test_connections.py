"""The server below its routes, over sockets: tokens of any letters, bodies and answers of any size
without a temporary folder, clients that close a half of their connection.
"""

import json
import socket
import tempfile

import pytest
import requests
from random_images import noise
from served import CHAT, HI, Running, user

from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import image_to_bytes
from seed_multimodal.serving.app import create_app, listen

ASK = b'{"text": "%b", "images": [], "max_new_tokens": 4}' % json.dumps(HI)[1:-1].encode()
STREAM = json.dumps({"messages": [user("hi")], "max_tokens": 4, "stream": True}).encode()
HEAD = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
POST = HEAD + b"Content-Length: %d\r\n\r\n%b"
OLD = POST.replace(b"1.1", b"1.0")
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def running(tiny) -> Running:
    return Running(tiny)


@pytest.mark.parametrize(
    "sent, answers, end",
    [
        (GET, 1, b"}\n"),
        (OLD % (b"/generate", len(ASK), ASK), 1, b"}\n"),
        (CHUNKED % (b"/generate", len(ASK), ASK), 1, b"}\n"),
        (POST % (CHAT.encode(), len(STREAM), STREAM), 1, b"data: [DONE]\n\n\r\n0\r\n\r\n"),
        (POST % (b"/generate", len(ASK), ASK) * 3, 3, b"}\n"),
    ],
    ids=["GET", "HTTP/1.0", "chunked", "stream", "pipelined"],
)
def test_clients_that_close_their_half_get_the_answers(running, sent, answers, end):
    # As `nc -N` and socat do at the end of their input.
    with running.connect() as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    assert received.count(b" 200 OK\r\n") == answers and received.endswith(end)
    assert b"HTTP/1.0" not in sent or received.startswith(b"HTTP/1.0 200")


def test_bodies_that_are_too_large_are_refused_before_they_are_sent(running):
    expect = GET[:-2] + b"Expect: 100-continue\r\nContent-Length: 1000000000000\r\n\r\n"
    with running.connect() as sock:
        sock.sendall(expect)
        assert sock.recv(12) == b"HTTP/1.1 413"


def test_large_requests_and_answers_need_no_temporary_folder(running, monkeypatch):
    # Of a container whose /tmp is full or read-only.
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    image = noise(0).resize((700, 700)).effect_spread(9)
    form = {"files": {"image": ("a.png", image_to_bytes(image))}, "data": {"prompt": "Mix it."}}
    for route, content in {
        CHAT: {"json": {"messages": [user(image, "What is it?")], "max_tokens": 4}},
        "/v1/images/edits": form,
        "/v1/images/generations": {"json": {"prompt": "a fish", "n": 8, "size": "1024x1024"}},
    }.items():
        answer = requests.post(f"{running.root}{route}", **content, timeout=60)
        assert answer.status_code == 200 and answer.json()
        assert max(len(answer.content), len(answer.request.body)) > 1 << 20


@pytest.mark.parametrize("token", ["abc=def", "YWJj==", "a b,c", "pässword", "voilà", "秘密", '"'])
def test_tokens_of_any_letters_fit(tiny, token):
    url = f"{Running(tiny, token=token).root}/ready"
    # Clients send it as UTF-8, or as Latin-1 if they can.
    right = {token.encode(), token.encode("latin-1", "ignore") or token.encode()}
    wrong = {b"", b"??", token.encode()[:-1], token.encode() + b"x"}
    sent = {b"Bearer " + item: 200 for item in right} | {b"Bearer " + item: 401 for item in wrong}
    sent |= {b"bearer   " + token.encode(): 200, b"Basic " + token.encode(): 401}
    for header, status in sent.items():
        assert requests.get(url, headers={"Authorization": header}).status_code == status, header


@pytest.mark.parametrize("token", [" abc", "abc\n", "a\tb", "a\0", "abc\u00a0", "\ufeffabc"])
def test_tokens_that_no_header_holds_are_refused_at_start(tiny, token):
    with pytest.raises(ConfigError, match="control characters"):
        create_app(tiny, token=token)
    with pytest.raises(ConfigError, match="control characters"):
        listen("127.0.0.1", 0, token)
