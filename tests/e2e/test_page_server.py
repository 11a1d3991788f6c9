"""The page as a program, by Gradio's own client: a stalled backend, uploads that are no pictures,
SIGTERM."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from real_processes import free_port
from repository import ROOT

SETTINGS = (
    False,
    None,
    1,
    64,
    0.0,
    0.5,
    0,
)  # force, ratio, beams, tokens, temperature, top_p, rounds
pytestmark = [pytest.mark.process, pytest.mark.slow]


class Page:
    """The program, and visitors."""

    def __init__(self, folder: Path, backend: int) -> None:
        # A fresh process: a warm one has chosen its folder of temporary files.
        self.process = subprocess.Popen(
            (
                f"{sys.executable} {ROOT / 'gradio_demo' / 'seed_llama_gradio.py'} "
                f"--model_type nano --server_port {free_port()} "
                f"--request_address http://127.0.0.1:{backend}/generate"
            ).split(),
            stdout=subprocess.PIPE,
            text=True,
            # The proxies are for the internet; Gradio would ask them for its own page.
            env={
                **os.environ,
                "TMPDIR": str(folder),
                "http_proxy": "http://127.0.0.1:9",
                "ALL_PROXY": "socks5://127.0.0.1:9",
            },
        )
        assert self.process.stdout is not None
        line = next(line for line in self.process.stdout if "The chat is at" in line)
        self.address = line.split("The chat is at ")[1].split()[0]

    def visitor(self) -> Any:
        from gradio_client import Client

        return Client(self.address, verbose=False, download_files=False)


@pytest.fixture()
def page(tmp_path) -> Iterator[Page]:
    """A page whose backend takes requests and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as stalled:
        running = Page(tmp_path, stalled.getsockname()[1])
        yield running
        running.process.kill()
        running.process.wait()


def test_visitors_do_not_wait_for_each_other_and_sigterm_removes_their_images(page, tmp_path):
    from gradio_client import handle_file

    Image.new("RGB", (40, 30), (9, 99, 199)).save(tmp_path / "mine.png")
    for index in range(3):  # each sees the message, though nobody gets an answer
        visitor = page.visitor()
        message = {"text": f"visitor {index}", "files": [handle_file(tmp_path / "mine.png")]}
        visitor.predict(message, api_name="/on_submit")
        assert f"visitor {index}" in str(next(iter(visitor.submit(*SETTINGS, api_name="/reply"))))
    assert (
        len(list(tmp_path.glob("seed_chat_*/**/*.png"))) >= 4
    )  # the uploads, and a copy of each visitor
    page.process.send_signal(signal.SIGTERM)
    assert page.process.wait(30) in (0, 130)
    assert not list(tmp_path.glob("seed_chat_*"))
