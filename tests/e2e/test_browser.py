"""The whole demo in a real browser: both programs as their own processes on free ports, driven by headless Chromium."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from real_processes import free_port

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
INSTALL = ("The browser test needs {missing}: run scripts/test.sh as root, or install Debian's chromium and "
           "chromium-driver (apt-get install chromium chromium-driver).")
pytestmark = pytest.mark.timeout(900)


class Program:
    """A started program."""

    def __init__(self, *command: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1",
                       "GRADIO_ANALYTICS_ENABLED": "False"}
        self.process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True,
                                        stdout=subprocess.PIPE)
        self.address = ""

    def wait_for(self, words: str) -> str:
        """What follows `words` in the first line that holds them."""
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if words in line), None)
        assert line is not None, f"{self.process.args} ended early"
        return line.split(words)[1].split()[0]

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture()
def backend(tiny_folder: Path) -> Iterator[Program]:
    program = Program("gradio_demo/seed_llama_flask.py", "--system", str(tiny_folder), "--port", "0",
                      "--llm_device", "cpu", "--tokenizer_device", "cpu")
    yield program
    program.stop()


@pytest.fixture()
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = " and ".join(name for name, path in paths.items() if path is None)
    if missing:
        pytest.fail(INSTALL.format(missing=missing), pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--disable-dev-shm-usage", "--window-size=1360,1000", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths["chromedriver"]))
    driver.set_page_load_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.fixture()
def page(backend: Program, browser: Any) -> Iterator[Page]:
    backend.address = backend.wait_for("answering at ")
    frontend = Program("gradio_demo/seed_llama_gradio.py", "--model_type", "nano", "--server_port", str(free_port()),
                       "--request_address", backend.address)
    browser.get(frontend.wait_for("The chat is at "))
    yield Page(browser)
    frontend.stop()


class Page:
    """What a visitor sees and does."""

    def __init__(self, browser: Any) -> None:
        from selenium.webdriver.common.by import By

        self.browser = browser
        self.css = By.CSS_SELECTOR
        self.until(lambda: self.all("#submit"), "the page to load")

    def until(self, true: Callable[[], Any], what: str) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            return WebDriverWait(self.browser, SECONDS, ignored_exceptions=[StaleElementReferenceException]).until(
                lambda _: true())
        except TimeoutException:
            pytest.fail(f"waited {SECONDS} s for {what}; the page says: {self.text('body')[:2000]}")

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements(self.css, selector)

    def text(self, selector: str) -> str:
        return " ".join(element.text for element in self.all(selector))

    def upload(self, file: Path) -> None:
        self.all("#picture input[type=file]")[0].send_keys(str(file))
        self.until(lambda: self.all("#picture img"), "the picture's preview")

    def write(self, text: str) -> None:
        box = self.all("#message textarea")[0]
        box.clear()
        box.send_keys(text)

    def click(self, selector: str) -> None:
        self.until(lambda: self.all(selector) and self.all(selector)[0].is_enabled(), f"{selector} to be ready")
        self.all(selector)[0].click()

    def force_picture(self) -> None:
        self.all("#force input[type=radio]")[0].click()

    def messages(self, role: str) -> list[Any]:
        return self.all(f"#chat .{role}.message, #chat .message.{role}")

    def pictures(self, role: str) -> list[tuple[int, int]]:
        """Sizes of the images that the browser really decoded in messages of `role`."""
        return [tuple(size) for size in self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].filter(i => i.complete && i.naturalWidth)"
            ".map(i => [i.naturalWidth, i.naturalHeight])", f"#chat .{role} img")]

    def watch(self, role: str) -> Callable[[], list[str]]:
        """From now on note each image that appears in messages of `role`; gives their addresses so far, in order."""
        self.browser.execute_script(
            "const seen = window.seen = []; const look = () => document.querySelectorAll(arguments[0]).forEach("
            "i => { if (i.src && !seen.includes(i.src)) seen.push(i.src) }); look();"
            "new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true})"
            .replace("arguments[0]", repr(f"#chat .{role} img")))
        return lambda: self.browser.execute_script("return window.seen")

    def answered(self) -> bool:
        """The model's turn is over: nothing waits, and Regenerate can be pressed."""
        return "Waiting" not in self.text("#status") and self.all("#regenerate")[0].is_enabled()


def answered(backend: Program) -> int:
    """How many requests the backend has answered."""
    return int(requests.get(backend.address.replace("/generate", "/health"), timeout=30).json()["answered"])


@pytest.mark.browser
@pytest.mark.process
def test_a_chat_with_images_in_both_directions(page: Page, backend: Program, picture: Image.Image,
                                                 tmp_path: Path) -> None:
    backend.process.send_signal(signal.SIGSTOP)  # an answer that takes long
    page.write("Are you busy?")
    page.click("#submit")
    page.until(lambda: "Waiting" in page.text("#status") and not page.all("#submit")[0].is_enabled(), "the wait")
    page.click("#clear")
    page.until(lambda: not page.messages("user") and page.all("#submit")[0].is_enabled(), "a page that can be used")
    file = tmp_path / "stripes.png"
    picture.save(file)
    page.upload(file)
    page.write("What is it?")
    page.click("#submit")
    page.until(lambda: "What is it?" in page.text("#chat .user") and "Waiting" in page.text("#status"), "the next wait")
    backend.process.send_signal(signal.SIGCONT)
    page.until(lambda: page.messages("bot") and page.answered(), "the first answer")
    assert "What is it?" in page.text("#chat .user")
    page.until(lambda: len(page.pictures("user")) == 1, "the sent picture in the conversation")
    assert page.pictures("bot") == []

    page.write("Please draw a red apple.")
    page.force_picture()
    appeared = page.watch("bot")
    page.click("#submit")
    page.until(lambda: "Here it is." in page.text("#chat .bot") and page.answered(), "the drawn picture")
    assert page.pictures("bot") == [(16, 16)]
    final = page.all("#chat .bot img")[0].get_attribute("src")
    assert len(appeared()) >= 2 and appeared()[-1] == final, "previews in the place of the picture, then the picture"

    (tmp_path / "fake.png").write_bytes(b"no picture at all")
    page.upload(tmp_path / "fake.png")
    page.click("#submit")
    page.until(lambda: "fake.png: not an image" in page.text("#status"), "the sentence about the picture")
    assert not page.all(".toast-body") and not page.all("#picture img")  # no error of Gradio's, nothing left to send

    before = answered(backend)
    page.click("#regenerate")
    page.until(lambda: answered(backend) == before + 1 and page.answered(), "the drawing made again")
    assert len(page.pictures("bot")) == 1

    backend.stop()
    page.write("Are you there?")
    page.click("#submit")
    page.until(lambda: "start the backend" in page.text("#status"), "the sentence about the backend")
    page.click("#regenerate")
    page.until(lambda: page.all("#regenerate")[0].is_enabled(), "the end of the vain attempt")
    assert "Are you there?" in page.text("#chat .user") and "draw a red apple" in page.text("#chat .user")

    page.click("#clear")
    page.until(lambda: not page.messages("user") and not page.messages("bot"), "an empty conversation")
