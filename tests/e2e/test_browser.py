"""The whole demo in a real browser: both programs as their own processes on free ports, driven by
headless Chromium."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from real_processes import free_port
from repository import ROOT
from served import serving
from waiting import wait_until
from warm_processes import PYTHON

SECONDS = 120  # for a page or an answer, on a busy machine
INSTALL = (
    "The browser test needs {missing}: run scripts/test.sh as root, or install Debian's chromium "
    "and chromium-driver (apt-get install chromium chromium-driver)."
)
DRAW = "Please draw a noto dog left of a tree in a meadow."
SNOWMAN = ROOT / "images" / "fox_and_snowman.png"
pytestmark = [pytest.mark.timeout(600), pytest.mark.browser, pytest.mark.process]


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT / "src"),
    "HF_HUB_OFFLINE": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}


@pytest.fixture(scope="module")
def backend() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address and its process."""
    flags = "--system nano --port 0 --llm_device cpu --tokenizer_device cpu"
    command = [PYTHON, "gradio_demo/seed_llama_flask.py", *flags.split()]
    with serving(command, cwd=ROOT, env=ENVIRONMENT) as running:
        yield running


@contextlib.contextmanager
def page_of(backend: str, flags: str = "") -> Iterator[str]:
    """The address of a page with that backend."""
    flags += f" --model_type nano --server_port {free_port()} --request_address {backend}"
    command = [PYTHON, "gradio_demo/seed_llama_gradio.py", *flags.split()]
    with serving(command, "The chat is at ", cwd=ROOT, env=ENVIRONMENT) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    from selenium import webdriver

    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = " and ".join(name for name, path in paths.items() if path is None)
    if missing:
        pytest.fail(INSTALL.format(missing=missing), pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = paths["chromium"]
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--disable-dev-shm-usage --window-size=1360,1000 --ignore-certificate-errors "
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    )
    for flag in flags.split():
        options.add_argument(flag)
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(paths["chromedriver"])
    )
    driver.set_page_load_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def frontend(backend) -> Iterator[str]:
    """The address of the page."""
    with page_of(backend[0]) as address:
        yield address


@pytest.fixture()
def page(frontend: str, browser) -> Iterator[Page]:
    yield Page(browser, frontend)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    assert [
        url for url in urls if url.startswith(("http", "ws")) and not url.startswith(frontend)
    ] == []


class Page:
    """What a visitor sees and does."""

    def __init__(self, browser, address: str):
        self.browser = browser
        self.address = address
        browser.get("about:blank")
        browser.get_log("performance")  # an earlier page's requests
        browser.get(address)
        # An earlier page's conversations.
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        browser.refresh()
        self.until(
            lambda: self.all("#message textarea") and self.all("#chat .example"), "the page to load"
        )

    def until(self, true: Callable[[], Any], what):
        from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            return WebDriverWait(
                self.browser, SECONDS, 0.1, ignored_exceptions=[StaleElementReferenceException]
            ).until(lambda _: true())
        except TimeoutException:
            pytest.fail(f"waited {SECONDS} s for {what}; the page says: {self.text('body')[:2000]}")

    def all(self, selector: str) -> list:
        return [*self.browser.find_elements("css selector", selector)]

    def text(self, selector: str) -> str:
        return " ".join(element.text for element in self.all(selector))

    def click(self, selector: str):
        # One script: Gradio disables buttons while an answer grows.
        script = (
            "const last = [...document.querySelectorAll(arguments[0])].at(-1);"
            "if (last && !last.disabled) return last.click() || true"
        )
        self.until(lambda: self.browser.execute_script(script, selector), f"{selector} to be ready")

    def tab(self, name):
        self.until(
            lambda: [button for button in self.all("button[role=tab]") if button.text == name], name
        )[0].click()

    def choose(self, box: str, *files: Path):
        n_images = len(self.all(f"{box} img"))
        field = self.all(f"{box} input[type=file]")[0]
        self.browser.execute_script(
            "arguments[0].value = ''", field
        )  # else they are added to the last ones
        field.send_keys("\n".join(map(str, files)))
        self.until(lambda: len(self.all(f"{box} img")) > n_images, "the upload")

    def send(self, text, *files: Path):
        if files:
            self.choose("#message", *files)
        self.all("#message textarea")[0].send_keys(text)
        self.click("#message .submit-button")

    def waits(self) -> bool:
        """Whether an answer grows. Its first parts are seen before the button that stops it."""
        # While it grows, the browser keeps what a reload would leave of it: a stopped answer.
        script = "return localStorage['seed-chat-' + sessionStorage['seed-chat-']] ?? ''"
        is_incomplete = "Stopped." in self.browser.execute_script(script)
        is_empty = [row.text for row in self.all("#chat .bot-row")[-1:]] == ["…"]
        return is_incomplete or is_empty or bool(self.all("#message .stop-button"))

    def says(self, sentence: str):
        self.until(
            lambda: sentence in self.text("[data-testid=toast-body]"), f"the sentence {sentence!r}"
        )

    def answered(self, rounds: int):
        self.until(
            lambda: (
                len(self.all("#chat .bot-row")) >= rounds
                and not self.waits()
                and self.all("#message .submit-button")
            ),
            f"answer {rounds}",
        )

    def images(self, selector: str) -> list[str]:
        """Addresses of the images that the browser really decoded there."""
        sources: list[str] = self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0] + ' img')]"
            ".filter(i => i.complete && i.naturalWidth).map(i => i.src)",
            selector,
        )
        return sources

    def watch(self) -> Callable[[], Any]:
        """From now on note each text and image of the answers; gives them so far."""
        self.browser.execute_script("""
            const seen = window.seen = {images: [], texts: []}
            const note = (list, value) => { if (value && !list.includes(value)) list.push(value) }
            const look = () => {
                document.querySelectorAll('#chat .bot img').forEach(i => note(seen.images, i.src))
                const texts = document.querySelectorAll('#chat .bot .md')
                texts.forEach(t => note(seen.texts, t.innerText))
            }
            look()
            const changes = {subtree: true, childList: true, attributes: true, characterData: true}
            new MutationObserver(look).observe(document.body, changes)""")
        return lambda: self.browser.execute_script("return window.seen")


def test_a_chat_with_images_in_both_directions(page: Page):
    # What only a browser shows: growing text, previews, and the buttons below an answer.
    observed = page.watch()
    page.send("Please provide an accurate and concise description of the given image.", SNOWMAN)
    page.answered(1)
    assert "snowman" in page.text("#chat .bot") and len(page.images("#chat .user")) == 1
    full_text = page.all("#chat .bot .md")[0].text
    texts = [text.strip() for text in observed()["texts"] if text != "…"]
    assert all(map(full_text.startswith, texts)), "the text grows; how often is the browser's"

    # An answer is followed in a small window, too, also by a visitor who looked at the beginning.
    page.browser.set_window_size(390, 600)
    page.browser.execute_script("document.querySelector('#chat .bubble-wrap').scrollTo(0, 0)")
    page.send(DRAW)
    page.until(lambda: page.images("#chat .bot") and not page.waits(), "the drawn image")
    below = (
        "const box = document.querySelector('#chat .bubble-wrap');"
        "return box.scrollHeight - box.scrollTop - box.clientHeight"
    )
    page.until(lambda: page.browser.execute_script(below) < 10, "the end of the answer")
    first = page.images("#chat .bot")
    # Previews were in the place of the image; how many of them are seen is the browser's, too.
    assert len(first) == 1 and observed()["images"][-1] == first[0]

    # A reload continues the conversation; on a phone, too, the message box is in view.
    page.browser.set_window_size(390, 844)
    page.browser.refresh()
    page.until(lambda: len(page.images("#chat .bot")) == 1, "the conversation after a reload")
    buttons = page.all("#chat button[aria-label=Retry]")
    assert [button.is_displayed() for button in buttons].count(True) == 1
    others = page.all("#chat [aria-label=Share], #chat [title=Share], #chat [aria-label=Clear]")
    assert not any(button.is_displayed() for button in others)
    script = "return arguments[0].getBoundingClientRect().bottom <= innerHeight"
    assert page.browser.execute_script(script, page.all("#message")[0])
    page.browser.set_window_size(1360, 1000)
    first = page.images("#chat .bot")

    page.click("#chat button[aria-label=Retry]")
    page.until(
        lambda: page.images("#chat .bot") not in ([], first) and not page.waits(), "another image"
    )
    page.answered(2)

    second = page.images("#chat .bot")
    page.click("#chat button[aria-label=Retry]")
    page.until(lambda: page.images("#chat .bot") != second, "the answer to begin")
    page.click("#chat button[aria-label=Undo]")
    page.until(lambda: not page.images("#chat .bot"), "the drawing to be taken back")
    page.until(
        lambda: page.all("#message textarea")[0].get_attribute("value") == DRAW, "the message back"
    )

    page.browser.refresh()
    page.until(lambda: page.images("#chat .user"), "the conversation after a reload")
    assert not page.images("#chat .bot")
    page.click("#chat .message-buttons-right button[aria-label=Edit]")
    page.until(lambda: page.all("#chat textarea"), "the message to be edited")
    page.all("#chat textarea")[0].clear()
    page.all("#chat textarea")[0].send_keys("What is on the left?")
    page.click("#chat button[aria-label=Submit]")
    page.until(lambda: "What is on the left?" in page.text("#chat .user"), "the edited message")
    page.until(
        lambda: "fox" in page.text("#chat .bot") and "snowman" not in page.text("#chat .bot"),
        "the new answer",
    )
    assert len(page.images("#chat .user")) == 1

    page.click("#new")  # perhaps before the answer's end
    page.until(lambda: not page.all("#chat .message"), "an empty conversation")
    # The list has it, in a second tab, too, whose chat does not replace it. A deletion asks.
    page.browser.switch_to.new_window("tab")
    page.browser.get(page.address)
    page.until(lambda: page.all("#conversations .choice"), "the list")
    page.send("What is a dog?")
    page.answered(1)
    page.until(lambda: len(page.all("#conversations .choice")) == 2, "both conversations")
    page.click("#conversations .choice")
    page.until(lambda: "What is on the left?" in page.text("#chat .user"), "the first one")
    page.click("#conversations li:has([aria-current]) summary")
    page.all("#conversations details[open] [aria-label^=Delete]")[0].click()
    page.browser.switch_to.alert.accept()
    page.until(lambda: page.all("#chat .example"), "a new chat")
    assert [item.text for item in page.all("#conversations .choice")] == ["What is a dog?"]

    page.browser.set_window_size(390, 844)
    page.browser.refresh()
    page.until(lambda: page.all("#chat .example"), "the examples")
    time.sleep(1)  # Gradio scrolls after a moment
    first, message = page.all("#chat .example")[0].rect, page.all("#message")[0].rect
    page.browser.set_window_size(1360, 1000)
    assert 0 < first["y"] < message["y"] < 844 - message["height"]


def latency(page: Page, milliseconds: int):
    page.browser.execute_cdp_cmd("Network.enable", {})
    conditions = {"offline": False, "downloadThroughput": -1, "uploadThroughput": -1}
    conditions["latency"] = milliseconds
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)


def test_nothing_typed_or_chosen_is_lost(page: Page, tmp_path):
    box = page.all("#message textarea")[0]
    value = lambda: page.all("#message textarea")[0].get_attribute("value")  # noqa: E731
    # A picture in the box outlasts a new chat, and several clicks send it once.
    page.choose("#message", SNOWMAN)
    page.click("#new")
    page.until(lambda: page.all("#message img"), "the picture in the box")
    box.send_keys("What is it?")
    send = "for (const _ of '123') document.querySelector('#message .submit-button').click()"
    page.browser.execute_script(send)
    page.answered(1)
    assert "snowman" in page.text("#chat .bot") and len(page.all("#chat .user-row")) == 1
    assert not page.all("[data-testid=toast-body]") and not page.all("#message img")

    # What is typed while the page waits, or refuses a file, stays. One warning a file.
    latency(page, 500)
    box.send_keys("if a<b and c>d; &lt; <img src=//127.0.0.1:9/x.png> <!-- x\n")
    box.send_keys("And a cat?")
    page.until(lambda: len(page.all("#chat .user-row")) == 2, "the message")
    page.answered(2)
    assert value() == "And a cat?"
    assert page.all("#chat .user-row")[1].text.startswith("if a<b and c>d; &lt; <img src=//")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.choose("#message", broken)
    box.send_keys(" And a dog?")
    page.says("broken.png")
    page.until(lambda: not page.all("#message .thumbnail-wrapper"), "the file to be taken out")
    assert value() == "And a cat? And a dog?" and len(page.all("[data-testid=toast-body]")) == 1
    latency(page, 0)


def test_the_marked_chat_is_the_shown_one(page: Page):
    # A click on another chat while an answer grows: late updates are not shown.
    page.send("What is a dog?")
    page.answered(1)
    page.click("#new")
    page.until(lambda: page.all("#chat .example"), "a new chat")
    page.send("Tell a story about a noto fox and a snowman in four pictures.")
    page.until(lambda: page.images("#chat .bot"), "the first picture")
    for word in ("dog", "story", "dog"):
        page.click(f"#conversations .choice[title*={word}]")
        page.until(lambda: word in page.text("#chat .user-row"), word)  # noqa: B023
        time.sleep(1)
        assert word in page.text("#conversations [aria-current]")
        assert word in page.text("#chat .user-row")
    # The story that was left goes on.
    page.click("#conversations .choice[title*=story]")
    page.until(lambda: len(page.images("#chat .bot")) == 4 and not page.waits(), "the story")
    assert "Stopped." not in page.text("#chat")


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The script of axe-core, by npm."""
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "pack", "--silent", "axe-core@4.14.1"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        if "CI" in os.environ:
            raise
        pytest.skip(f"needs axe-core of npm ({error})")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()  # type: ignore[union-attr]


def test_accessibility(page: Page, axe):
    rules = "wcag2a wcag2aa wcag21a wcag21aa wcag22aa".split()
    check = "axe.run(document, {runOnly: arguments[0]}).then(arguments[1])"

    def accept(name: str):
        time.sleep(1)  # colours and bars move
        page.browser.execute_script(axe)
        for violation in page.browser.execute_async_script(check, rules)["violations"]:
            html = [node["html"] for node in violation["nodes"]]
            assert violation["impact"] not in ("serious", "critical"), (name, violation["id"], html)

    accept("start")
    page.choose("#message", SNOWMAN, *sorted((ROOT / "images").glob("*.png"))[:7])
    accept("box")
    page.send("What is in these pictures?")
    page.answered(1)
    page.send(DRAW)
    page.until(lambda: page.images("#chat .bot") and not page.waits(), "the drawn image")
    accept("chat")
    page.click("#conversations summary")
    page.click(".sidebar.right .toggle-button")
    accept("menu and settings")
    page.click(".sidebar.right .toggle-button")
    page.tab("Edit")
    accept("edit")
    page.tab("Chat")
    page.browser.set_window_size(390, 844)
    accept("phone")
    page.browser.set_window_size(1360, 1000)
    page.browser.execute_script("document.querySelector('#conversations').page.dark()")
    page.browser.refresh()
    page.until(lambda: page.images("#chat .bot"), "the conversation after a reload")
    assert page.all("body.dark"), "dark mode stays"
    accept("dark")


@pytest.fixture()
def logging_page(backend, tmp_path) -> Iterator[str]:
    """The address of a page with a prefix and a log."""
    with page_of(backend[0], f"--root_path /chat --log-votes {tmp_path / 'log'}") as address:
        yield address


@pytest.fixture()
def proxy(backend, logging_page: str, tmp_path) -> Iterator[str]:
    """The page with a log behind the manual's nginx, with TLS, a password and a prefix."""
    if shutil.which("nginx") is None:
        pytest.skip("needs nginx (apt-get install nginx-light)")
    port = free_port()
    # 1. The certificate and the password.
    key, certificate, passwords = (tmp_path / name for name in ("key", "certificate", "passwords"))
    options = "-x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    command = ["openssl", "req", *options.split(), "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    passwords.write_text("visitor:{PLAIN}secret\n")

    # 2. The manual's configuration, with the addresses of this test.
    manual = (ROOT / "docs" / "how-to" / "serve.md").read_text()
    server = manual.split("```nginx\n")[1].split("```")[0]
    letsencrypt = "/etc/letsencrypt/live/seed.example.org"
    for old, new in {
        "listen 443": f"listen 127.0.0.1:{port}",
        f"{letsencrypt}/fullchain.pem": str(certificate),
        f"{letsencrypt}/privkey.pem": str(key),
        "/etc/nginx/seed.htpasswd": str(passwords),
        "http://127.0.0.1:7860": logging_page,
        "http://127.0.0.1:7890": backend[0].removesuffix("/generate"),
    }.items():
        assert server.count(old) == 1, old
        server = server.replace(old, new)
    folders = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(
        f"daemon off; master_process off; pid {tmp_path}/pid; events {{}}\n"
        f"http {{ access_log off; {folders} {server} }}"
    )
    nginx = subprocess.Popen(["nginx", "-e", "stderr", "-c", configuration])
    address = f"https://127.0.0.1:{port}"
    wait_until(lambda: requests_get(f"{address}/health"))
    yield address
    nginx.terminate()
    nginx.wait(20)


def requests_get(address: str):
    """The JSON of an address; None while it does not answer."""
    try:
        response = requests.get(address, timeout=30, verify=False)
    except requests.ConnectionError:
        return None
    return response.json() if response.ok else None


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_page_and_routes_behind_the_manuals_proxy(proxy: str, browser, tmp_path):
    # 1. The page has a password, the routes pass without.
    assert requests_get(f"{proxy}/v1/models")["data"][0]["id"] == "nano"
    assert requests.get(f"{proxy}/chat/", verify=False, timeout=30).status_code == 401
    browser.get(proxy.replace("://", "://visitor:secret@") + "/chat/")

    # 2. An upload above nginx's own limit of 1 MiB, a drawing, and votes.
    photo = tmp_path / "photo.png"
    Image.effect_noise((1400, 1400), 90).save(photo)
    assert photo.stat().st_size > 1 << 20
    page = Page(browser, f"{proxy}/chat/")
    page.send("What is it?", photo)
    page.answered(1)
    assert "unlike those that this system learned" in page.text("#chat .bot")
    page.send(DRAW)
    page.until(lambda: page.images("#chat .bot") and not page.waits(), "the drawing")
    page.click("#chat button[aria-label=Dislike]")
    (log,) = (tmp_path / "log").glob("*-conv.json")
    page.until(lambda: "downvote" in log.read_text(), "the vote in the log")


@pytest.mark.nightly
def test_stop_cancels_the_answer_at_the_backend(page: Page, backend):
    address, process = backend
    health = address.replace("/generate", "/health")
    before = requests_get(health)["answered"]
    process.send_signal(signal.SIGSTOP)  # an answer that takes long
    page.send(DRAW)
    page.until(page.waits, "the wait")
    page.click("#message .stop-button")
    page.until(
        lambda: page.all("#message textarea")[0].get_attribute("value") == DRAW, "the message back"
    )
    page.until(
        lambda: not page.all("#chat .user.message") and not page.waits(),
        "the conversation as before",
    )
    process.send_signal(signal.SIGCONT)
    page.until(lambda: requests_get(health)["running"] == 0, "the backend to be free")
    assert requests_get(health)["answered"] == before


def test_tabs_draw_edit_and_exchange_codes(page: Page):
    # A known word is written into the message, which has the focus.
    assert page.browser.switch_to.active_element == page.all("#message textarea")[0]
    page.click("#known summary")
    page.until(lambda: len(page.images("#known")) > 8, "drawings of known things")
    for button in page.all("#known button")[:2]:
        button.click()
    assert page.all("#message textarea")[0].get_attribute("value") == "dog cat"

    # Every tab reaches the backend and shows its images.
    page.tab("Draw")
    page.all("#draw-text textarea")[0].send_keys("a fluent zebra in a meadow")
    page.click("#draw")
    page.until(lambda: len(page.images("#draw-images")) == 4, "four drawings")
    page.until(lambda: "does not know 'zebra'" in page.text("#draw-notes"), "the note")

    # The other tabs begin with samples.
    page.tab("Edit")
    page.click("#edit")
    page.until(lambda: page.images("#edit-images"), "the changed image")
    page.click("#edit-image button[title='Remove Image']")
    page.click("#edit")
    page.says("Choose an image first")

    page.tab("Codes")
    page.until(lambda: len(page.all(".strip span")) == 64, "32 coloured codes of each sample")
    page.click("#swap")
    page.until(lambda: len(page.images("#swap-images")) == 2, "the images from exchanged codes")
    # What is below the window is scrolled to.
    from selenium.webdriver import ActionChains

    before = page.all("#swap")[0].rect["y"]
    ActionChains(page.browser).scroll_by_amount(0, 500).perform()
    page.until(lambda: page.all("#swap")[0].rect["y"] < before, "the tab to be scrolled")

    # A model that writes no text has no chat.
    assert page.all("#chat-tab-button")[0].is_displayed()
    page.browser.execute_script("document.querySelector('#title').classList.add('no-chat')")
    assert not page.all("#chat-tab-button")[0].is_displayed()
