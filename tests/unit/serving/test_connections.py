"""The server below its routes, over sockets: tokens of any letters, bodies and answers of any size
without a temporary folder, clients that close a half of their connection.
"""

import contextlib
import http.client
import json
import socket
import tempfile
import time

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
CHUNKS = HEAD + b"Transfer-Encoding: %b\r\n\r\nzz\r\n"
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


LONG = b"Expect: 100-continue\r\nContent-Length: 1000000000000\r\n\r\n"


@pytest.mark.parametrize(
    "sent, status",
    [
        (GET[:-2] + LONG, 413),  # before the body is sent
        (HEAD % CHAT.encode() + LONG, 413),
        (HEAD % CHAT.encode() + b"Content-Length: -1\r\n\r\n", 400),
        (HEAD % CHAT.encode() + b"no header\r\n\r\n", 400),
        (HEAD % b"/generate" + b" folded" * 9000 + b"\nx\r\n\r\n", 400),
        ((HEAD % b"/generate" + b"X: ").ljust(1 << 18, b"x"), 431),
        (CHUNKS % (CHAT.encode(), b"gzip"), 501),
        (CHUNKS % (CHAT.encode(), b"chunked"), 400),
        (b"no request\r\n\r\n", 400),
        (GET.replace(b"/health", b"/v1//models"), 404),
    ],
)
def test_errors_below_flask_are_json_with_a_sentence(running, sent, status):
    with running.connect() as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        error = json.load(answer)["error"]
    assert (answer.status, answer.headers["Content-Type"]) == (status, "application/json")
    sentence = error if isinstance(error, str) else error["message"]
    assert sentence.endswith(".") and len(sentence) < 200


def test_clients_that_trickle_leave_the_server_to_others(tiny, monkeypatch):
    # 520 of them were all connections that the server has, for as long as they liked.
    monkeypatch.setattr("seed_multimodal.serving.app.IDLE_SECONDS", 2)
    running = Running(tiny)
    beginnings = [GET[:-4], POST % (b"/generate", 50_000, b""), b""]
    with contextlib.ExitStack() as stack:
        # 1. 600 clients that never finish a header or a body, or never begin.
        sockets = [stack.enter_context(running.connect()) for _ in range(600)]
        for index, sock in enumerate(sockets):
            with contextlib.suppress(OSError):
                sock.sendall(beginnings[index % 3])
        slow = stack.enter_context(running.connect())
        slow.sendall(POST % (b"/generate", 60_000 + len(ASK), ASK))

        # 2. Others are answered, also one whose body takes longer than the silence of a client.
        for _ in range(12):
            start = time.monotonic()
            assert running.health()["status"] == "ok" and time.monotonic() - start < 1
            slow.sendall(b" " * 5000)
            for index, sock in enumerate(sockets):
                with contextlib.suppress(OSError):
                    sock.sendall(b"a" if index % 3 < 2 else b"")
            time.sleep(0.3)
        assert slow.recv(12) == b"HTTP/1.1 200"

        # 3. All of the 600 are closed.
        for sock in sockets:
            sock.settimeout(0.1)
            with contextlib.suppress(ConnectionError):
                assert sock.recv(1) == b""


@pytest.mark.slow
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
