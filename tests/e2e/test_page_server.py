"""The page as a program, by Gradio's own client and by a stranger's: a stalled backend, SIGTERM,
files of others, hosts and web pages of others."""

import json
import os
import re
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator

import pytest
import requests
from PIL import Image
from random_images import noise
from real_processes import STARTED, free_port, nothing_stays_behind  # noqa: F401
from repository import ROOT
from served import Running, hostile_backend
from waiting import wait_until
from warm_processes import PYTHON

SETTINGS = (
    False,
    None,
    1,
    64,
    0.0,
    0.5,
    0,
)  # force, ratio, beams, tokens, temperature, top_p, rounds
PROXY = "https://seed.example.org"
pytestmark = [pytest.mark.process, pytest.mark.slow]


class Page:
    """The program, and visitors."""

    def __init__(self, folder, backend: int):
        self.folder = folder
        self.process = subprocess.Popen(
            (
                f"{PYTHON} {ROOT / 'gradio_demo' / 'seed_llama_gradio.py'} "
                f"--model_type nano --server_port {free_port()} "
                f"--request_address http://127.0.0.1:{backend}/generate "
                f"--allow-origin {PROXY} --log-votes {folder / 'votes'}"
            ).split(),
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            # The proxies are for the internet; Gradio would ask them for its own page.
            env={
                **os.environ,
                "TMPDIR": str(folder),
                "http_proxy": "http://127.0.0.1:9",
                "ALL_PROXY": "socks5://127.0.0.1:9",
            },
        )
        STARTED.append(self.process)
        assert self.process.stdout is not None
        line = next(line for line in self.process.stdout if "The chat is at" in line)
        self.address = line.split("The chat is at ")[1].split()[0]

        config = requests.get(f"{self.address}/config", timeout=60).json()
        self.events = {event["api_name"]: event["id"] for event in config["dependencies"]}

    def upload(self, file) -> dict:
        """A file in Gradio's form, uploaded as a browser does."""
        with open(file, "rb") as content:
            url = f"{self.address}/gradio_api/upload"
            (path,) = requests.post(url, files={"files": content}, timeout=60).json()
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def event(self, name, inputs, until="process_completed") -> str:
        """What is answered to an event of the page, up to a message."""
        api = f"{self.address}/gradio_api"
        session = {"session_hash": uuid.uuid4().hex}
        body = {"data": inputs, "fn_index": self.events[name], **session}
        requests.post(f"{api}/queue/join", json=body, timeout=60)
        lines = []
        url = f"{api}/queue/data"
        with requests.get(url, params=session, timeout=60, stream=True) as answer:
            for line in answer.iter_lines(decode_unicode=True):
                lines.append(line)
                if until in line:
                    break
        return "\n".join(lines)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    """A page whose backend takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as stalled:
        yield Page(tmp_path_factory.mktemp("page"), stalled.getsockname()[1])


# ---- strangers


# Events of the page that name the PATH of a stranger, first in a conversation of a browser.
EVENTS = """\
on_model [null, 0, {"id": "1", "model": "", "turns": [{"role": "user", "parts": [{"url": "PATH"}], "notes": []}]}]
on_model [null, 0, {"id": "1", "model": "", "turns": [{"role": "user", "parts": [{"stored_url": "PATH"}], "notes": []}]}]
on_model [null, 0, {"id": "1", "model": "", "turns": [{"role": "user", "parts": [{"path": "PATH", "codes": [1]}], "notes": []}]}]
on_select [null, {"id": "PATH", "model": "", "turns": []}]
on_codes [null, {"path": "PATH"}]
on_codes [null, {"path": "PATH", "meta": {"_type": "gradio.FileData"}}]
on_codes [null, {"path": "SAMPLE", "meta": {"path": "PATH", "meta": {"_type": "gradio.FileData"}}}]
on_change [null, {"path": "PATH"}, "at night", 0]
on_submit [null, {"text": "Hi", "files": [{"path": "PATH", "meta": {"_type": "gradio.FileData"}}]}, null, SETTINGS]
on_submit [null, {"text": "Hi", "path": "SAMPLE", "files": [{"path": "PATH", "meta": {"_type": "gradio.FileData"}}]}, null, SETTINGS]
on_submit [null, {"text": "Hi", "files": []}, {"id": "PATH", "model": "", "turns": []}, SETTINGS]
on_choose [null, {"text": "", "files": [{"path": "PATH", "url": "PATH", "meta": {"_type": "gradio.FileData"}}]}]
on_undo [null, {"id": "1", "model": "", "turns": [{"role": "user", "parts": [{"url": "PATH"}], "notes": []}]}]
"""  # noqa: E501
EVENTS = EVENTS.replace("SAMPLE", str(ROOT / "images" / "fox.png"))
EVENTS = EVENTS.replace("SETTINGS", json.dumps(SETTINGS)[1:-1])
HOSTILE = '{"data": [{"id": "", "b64_json": "PATH", "codes": {"path": "PATH"}}]}'


@pytest.mark.parametrize("backend", ["none", "nano", "hostile"])
def test_strangers_get_no_file_of_the_pages_machine(backend, tmp_path, tiny):
    # A private image, and a text in the working folder. A hostile backend names it, too.
    noise(0).save(tmp_path / "private.png")
    text = tmp_path / "README.md"
    text.write_text("SECRET")
    answers = []
    with hostile_backend(HOSTILE.replace("PATH", str(text))) as hostile:
        ports = {"none": free_port(), "nano": Running(tiny).port, "hostile": hostile}
        page = Page(tmp_path, ports[backend])
        for path in (tmp_path / "private.png", text, tmp_path / "nothing", "http://x.invalid"):
            for line in EVENTS.replace("PATH", str(path)).splitlines():
                name, inputs = line.split(" ", 1)
                answers.append(page.event(name, json.loads(inputs)))
            url = f"{page.address}/gradio_api/file={path}"
            assert requests.get(url, timeout=60).status_code in (403, 404)
    # Neither is shown or copied, nor is known whether a file exists.
    said = "\n".join(answers)
    assert said.count("process_completed") == len(answers)
    assert not re.search("SECRET|no such file|is a text", said)
    assert not [*tmp_path.glob("seed_chat_*/**/*.*")]


def test_what_visitors_do_not_need_is_closed(page):
    api = f"{page.address}/gradio_api"
    for name in "a.html a.svg a.js a.xml".split():
        (path,) = requests.post(f"{api}/upload", files={"files": (name, "")}, timeout=60).json()
        answer = requests.get(f"{api}/file={path}", timeout=60)
        assert "attachment" in str(answer.headers)
    # Gradio's other routes download, stream for ever, or tell of the page; an odd upload is no 500.
    closed = "proxy=http://127.0.0.1:9/ file=http://127.0.0.1:9/ dev/reload info runs openapi.json"
    for route in f"{closed} call/on_draw call/v2/on_draw run/on_draw".split():
        for answer in (
            requests.get(f"{api}/{route}", timeout=60),
            requests.post(f"{api}/{route}", json={}, timeout=60),
        ):
            assert answer.status_code == 404 and answer.json()["error"], route
    odd = {"data": [], "fn_index": 9999, "session_hash": "1"}
    for answer in (
        requests.post(f"{api}/upload", files={"files": (None, "")}, timeout=60),
        requests.post(f"{api}/queue/join", json=odd, timeout=60),
    ):
        assert answer.status_code == 400 and answer.json()["error"]
    policy = requests.get(page.address, timeout=60).headers["Content-Security-Policy"]
    assert "img-src 'self' data: blob:" in policy and "http" not in policy


def test_a_page_on_loopback_refuses_other_hosts_and_web_pages(page):
    # A name that points to 127.0.0.1, or a form of another web page, would use it as its user.
    allowed = [{}, {"Host": "localhost:1"}, {"Host": "seed.example.org", "Origin": PROXY}]
    others = [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}]
    api = f"{page.address}/gradio_api"
    gets = [page.address, f"{page.address}/config", f"{api}/heartbeat/x"]
    for url in [*gets, f"{api}/queue/join", f"{api}/upload"]:
        for headers in allowed + others:
            ask = requests.get if url in gets else requests.post
            with ask(url, headers=headers, stream=True, timeout=60) as answer:
                assert (answer.status_code == 403) == (headers in others), (url, headers)


def test_visitors_do_not_wait_for_each_other_and_sigterm_removes_their_images(page, tmp_path):
    # The last test: it ends the page.
    Image.new("RGB", (40, 30), (9, 99, 199)).save(tmp_path / "mine.png")
    for index in range(3):  # each sees the message, though nobody gets an answer
        message = {"text": f"visitor {index}", "files": [page.upload(tmp_path / "mine.png")]}
        inputs = [None, message, None, *SETTINGS]
        assert page.event("on_submit", inputs, until=f"visitor {index}")
    # The upload, and a copy of each visitor.
    wait_until(lambda: len(list(page.folder.glob("seed_chat_*/**/*.png"))) >= 4)
    page.process.send_signal(signal.SIGTERM)
    assert page.process.wait(300) in (0, 130)
    assert not list(page.folder.glob("seed_chat_*"))
