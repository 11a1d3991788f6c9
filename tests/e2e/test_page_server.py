"""The page as a program, by Gradio's own client and by a stranger's: a stalled backend, SIGTERM,
files of others, hosts and web pages of others."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest
import requests
from PIL import Image
from random_images import noise
from real_processes import STARTED, free_port, nothing_stays_behind  # noqa: F401
from repository import ROOT
from served import Running, hostile_backend

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
        # A fresh process: a warm one has chosen its folder of temporary files.
        self.process = subprocess.Popen(
            (
                f"{sys.executable} {ROOT / 'gradio_demo' / 'seed_llama_gradio.py'} "
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

    def visitor(self):
        from gradio_client import Client

        return Client(self.address, verbose=False, download_files=False)

    def event(self, name, inputs) -> str:
        """All that a stranger is answered to an event of the page."""
        api = f"{self.address}/gradio_api"
        session = {"session_hash": uuid.uuid4().hex}
        requests.post(f"{api}/call/{name}", json={"data": inputs, **session}, timeout=60)
        return requests.get(f"{api}/queue/data", params=session, timeout=60).text


@pytest.fixture()
def page(tmp_path) -> Iterator[Page]:
    """A page whose backend takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as stalled:
        yield Page(tmp_path, stalled.getsockname()[1])


def test_visitors_do_not_wait_for_each_other_and_sigterm_removes_their_images(page, tmp_path):
    from gradio_client import handle_file

    Image.new("RGB", (40, 30), (9, 99, 199)).save(tmp_path / "mine.png")
    for index in range(3):  # each sees the message, though nobody gets an answer
        visitor = page.visitor()
        message = {"text": f"visitor {index}", "files": [handle_file(tmp_path / "mine.png")]}
        visitor.predict(message, None, api_name="/on_submit")
        assert f"visitor {index}" in str(next(iter(visitor.submit(*SETTINGS, api_name="/reply"))))
    assert (
        len(list(tmp_path.glob("seed_chat_*/**/*.png"))) >= 4
    )  # the uploads, and a copy of each visitor
    page.process.send_signal(signal.SIGTERM)
    assert page.process.wait(30) in (0, 130)
    assert not list(tmp_path.glob("seed_chat_*"))


# ---- strangers


# Events of the page that name the PATH of a stranger, first in a conversation of a browser.
EVENTS = """\
on_model [0, {"model": "", "turns": [{"role": "user", "parts": [{"url": "PATH"}], "notes": []}]}]
on_model [0, {"model": "", "turns": [{"role": "user", "parts": [{"stored_url": "PATH"}], "notes": []}]}]
on_model [0, {"model": "", "turns": [{"role": "user", "parts": [{"path": "PATH", "codes": [1]}], "notes": []}]}]
on_codes [{"path": "PATH"}]
on_codes [{"path": "PATH", "meta": {"_type": "gradio.FileData"}}]
on_change [{"path": "PATH"}, "at night", 0]
on_submit [{"text": "Hi", "files": [{"path": "PATH", "meta": {"_type": "gradio.FileData"}}]}, null]
on_submit [{"text": "Hi", "files": []}, {"id": "PATH", "model": "", "turns": []}]
on_undo [{"model": "", "turns": [{"role": "user", "parts": [{"url": "PATH"}], "notes": []}]}]
"""  # noqa: E501
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
            assert requests.get(url, timeout=60).status_code == 403
    # Neither is shown or copied, nor is known whether a file exists.
    said = "\n".join(answers)
    assert said.count("process_completed") == len(answers)
    assert not re.search("SECRET|no such file|is a text", said)
    assert not [*tmp_path.glob("seed_chat_*/**/*.*")]


def test_uploads_are_no_pages(page):
    assert not requests.get(f"{page.address}/openapi.json", timeout=60).ok
    api = f"{page.address}/gradio_api"
    for name in "a.html a.svg a.js a.xml".split():
        (path,) = requests.post(f"{api}/upload", files={"files": (name, "")}, timeout=60).json()
        answer = requests.get(f"{api}/file={path}", timeout=60)
        assert "attachment" in str(answer.headers)


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
