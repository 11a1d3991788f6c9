"""Visits of the page whose steps a test orders: the scripts of its tabs in one Chromium, their
sessions in one event loop, in which everything that waits proceeds when the test says so."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import hashlib
import io
import json
import re
import shutil
import sys
import threading
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from seed_multimodal.errors import RequestError
from seed_multimodal.images.io import decode_text, image_to_base64
from seed_multimodal.models.registry import ModelCard
from seed_multimodal.serving import page
from seed_multimodal.serving.chat_session import ChatSession
from seed_multimodal.serving.client import ModelClient

FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage"
SETTINGS = (False, None, 1, 64, 0.0, 0.5, 0)
FILE_CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree")
TURNS = 12  # of the loop until everything waits again
MOST_STEPS = 5000


# ---- the browser


class Browser:
    """A page of Chromium with `visits.js`; a call takes a millisecond."""

    def __init__(self, driver: Any, script: Path):
        import websocket

        address = driver.capabilities["goog:chromeOptions"]["debuggerAddress"]
        with urllib.request.urlopen(f"http://{address}/json") as response:
            targets = json.load(response)
        (url,) = [target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page"]
        self.socket = websocket.create_connection(url, suppress_origin=True)
        self._evaluate(script.read_text(encoding="utf-8"))

    def __call__(self, function: str, *arguments: Any) -> Any:
        return self._evaluate(f"{function}(...{json.dumps(arguments)})")

    def _evaluate(self, script: str) -> Any:
        parameters = {"expression": script, "returnByValue": True}
        message = {"id": 1, "method": "Runtime.evaluate", "params": parameters}
        self.socket.send(json.dumps(message))
        result = json.loads(self.socket.recv())["result"]
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")


@contextlib.contextmanager
def open_browser(script: Path) -> Iterator[Browser]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or pytest.fail("chromium is missing")
    for flag in FLAGS.split():
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.get("about:blank")
        yield Browser(driver, script)
    finally:
        driver.quit()


# ---- what waits


class SteppedThread(threading.Thread):
    """A thread that waits before each file call."""

    current = threading.local()

    def __init__(self, function: Callable[[], Any]):
        super().__init__(daemon=True)
        self.function = function
        self.result: Future[Any] = Future()
        self.may_run = threading.Semaphore(0)
        self.waits = threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        self.current.thread = self
        self.may_run.acquire()
        try:
            self.result.set_result(self.function())
        except BaseException as error:  # noqa: BLE001 (of whatever the caller gets)
            self.result.set_exception(error)
        self.waits.release()

    def pause(self) -> None:
        self.waits.release()
        self.may_run.acquire()

    def step(self) -> bool:
        """Run until the next file call; whether there is one."""
        self.may_run.release()
        self.waits.acquire()
        return not self.result.done()


def pause_thread(event: str, arguments: tuple[Any, ...]) -> None:
    thread = getattr(SteppedThread.current, "thread", None)
    if thread and event in FILE_CALLS and "visits_of_test" in str(arguments[0]):
        thread.pause()


sys.addaudithook(pause_thread)


class Steps:
    """Coroutines and threads that wait, of which one at a time proceeds."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.waiting: list[asyncio.Future[None]] = []

    async def wait(self) -> None:
        self.waiting.append(self.loop.create_future())
        await self.waiting[-1]

    async def to_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """In place of `asyncio.to_thread`; a thread whose caller is cancelled runs to its end."""

        async def work() -> Any:
            await self.wait()
            thread = SteppedThread(functools.partial(function, *arguments))
            while thread.step():
                await self.wait()
            return thread.result.result()

        return await asyncio.shield(self.loop.create_task(work()))

    def step(self, index: int = 0) -> None:
        """One of what waits proceeds until it waits again."""

        async def proceed() -> None:
            self.waiting = [future for future in self.waiting if not future.done()]
            if self.waiting:
                self.waiting.pop(index % len(self.waiting)).set_result(None)
            for _ in range(TURNS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(proceed())

    def rest(self, index: int = 0) -> None:
        """Until nothing waits."""
        for _ in range(MOST_STEPS):
            if not asyncio.all_tasks(self.loop):
                return
            self.step(index)
        raise AssertionError("the page never comes to rest")

    def close(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        with contextlib.suppress(AssertionError):
            self.rest()
        self.loop.close()


# ---- the model


def answer_to(text: str, codes: list[int]) -> str:
    return f"{text.upper()} {codes}."


def drawing(code: int) -> str:
    """An image of one colour, which is its code, in base64."""
    return image_to_base64(Image.new("RGB", (8, 8), (code,) * 3))


def code_of(image: bytes | str | Path) -> int:
    """Of an image, a file or a data URL."""
    if isinstance(image, str) and image.startswith("data:"):
        image = decode_text(image.split(",")[1])
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
        return int(opened.convert("RGB").getpixel((0, 0))[0])


class ScriptedModel(ModelClient):
    """A backend whose answers follow from the message: of "…fail" half of one, then an error; of
    "…draw" with a preview and an image."""

    def __init__(self, steps: Steps):
        card = ModelCard("Scripted", tabs=("edit", "codes"), keeps_aspect=True)
        super().__init__("http://scripted/generate", card)
        self.steps = steps

    async def load_card(self) -> None:
        await self.steps.wait()
        self.name = "scripted"

    async def stream(self, route: str, **content: Any) -> AsyncIterator[Any]:
        for event in self.events(route, content.get("json", {})):
            await self.steps.wait()
            if isinstance(event, RequestError):
                raise event
            yield event

    def events(self, route: str, body: Any) -> Iterator[Any]:
        if route == "/v1/images/edits":
            yield {"data": [{"b64_json": drawing(250)}]}
        elif "images" in body:
            codes = [code_of(url) for url in body["images"]]
            yield {"data": [{"codes": [code]} for code in codes]}
        elif "codes" in body:
            yield {"data": [{"b64_json": drawing(codes[0])} for codes in body["codes"]]}
        else:
            yield from self.changes(body["messages"][-1]["content"])

    def changes(self, content: list[Any]) -> Iterator[Any]:
        text = "".join(part.get("text", "") for part in content)
        codes = [
            part["codes"][0] if "codes" in part else code_of(part["image_url"]["url"])
            for part in content
            if part["type"] == "image_url"
        ]
        answer = answer_to(text, codes)
        middle = len(answer) // 2
        changes: list[Any] = [{"content": answer[:middle]}, {"content": answer[middle:]}]
        if "draw" in text:
            image = {"image_url": {"url": f"data:image/png;base64,{drawing(240)}"}}
            changes.append({"images": [{**image, "preview": True}]})
            changes.append({"images": [{**image, "preview": False, "codes": [240]}]})
        for index, change in enumerate(changes):
            if index and "fail" in text:
                yield RequestError("It failed.")
            yield {"choices": [{"delta": change}]}


# ---- the page


class Tab:
    """A tab of a visitor, and its session; the tab of a reload is another one."""

    def __init__(self, name: str, prototype: ChatSession):
        self.name = name
        self.visitor = name[0]
        self.session = copy.deepcopy(prototype)
        self.is_open = True
        self.gallery: list[str] = []


class Visits:
    """Two visitors with two tabs each; what they do waits until `step` or `rest`."""

    def __init__(self, browser: Browser, folder: Path):
        self.browser = browser
        self.folder = folder
        self.steps = Steps()
        asyncio.to_thread, self.to_thread = self.steps.to_thread, asyncio.to_thread
        model = ScriptedModel(self.steps)
        self.prototype = ChatSession([model], model)
        self.errors: list[str] = []
        script = Path(page.__file__).with_name("conversations.js").read_text(encoding="utf-8")
        browser("reset", script, page.LIST)
        self.tabs: dict[str, Tab] = {}
        for name in ("a1", "a2", "b1", "b2"):
            self.load(name)

    def close(self) -> None:
        self.steps.close()
        asyncio.to_thread = self.to_thread

    def load(self, name: str) -> None:
        if name in self.tabs:
            self.tabs[name].is_open = False
        self.tabs[name] = Tab(name, self.prototype)
        self._request(self.tabs[name], self.browser("load", name, name[0]))

    def act(self, name: str, action: str, argument: Any = None) -> list[Any]:
        """Returns the requests that a visitor's action makes."""
        requests: list[Any] = self.browser("act", name, action, argument)
        self._request(self.tabs[name], requests)
        return requests

    def upload(self, base64: str, name: str) -> str:
        """Where Gradio keeps an uploaded file: visitors share files that are equal."""
        data = decode_text(base64) if base64 else b"no image"
        file = self.folder / hashlib.sha256(data).hexdigest() / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return str(file)

    def change_image(self, name: str, upload: str) -> None:
        """Of the Edit tab."""
        self._request(self.tabs[name], [("edit_tab", None, upload)])

    def _request(self, tab: Tab, requests: list[Any]) -> None:
        for request in requests:
            self._start(self._serve(tab, *request))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        async def watched() -> None:
            try:
                await work
            except Exception as error:  # noqa: BLE001 (Gradio shows any)
                self.errors.append(repr(error))

        self.steps.loop.create_task(watched())

    async def _serve(self, tab: Tab, event: str, sent: Any, argument: Any) -> None:
        await self.steps.wait()
        updates: asyncio.Queue[Any] = asyncio.Queue()
        self._start(self._deliver(tab, event, updates))
        handled = self._handler(tab.session, event, sent, argument)
        if isinstance(handled, AsyncGenerator):
            async with contextlib.aclosing(handled):
                async for update in handled:
                    updates.put_nowait(copy.deepcopy(update))
                    if not tab.is_open:
                        break
        else:
            updates.put_nowait(await handled)
        updates.put_nowait(None)

    def _handler(self, session: ChatSession, event: str, sent: Any, argument: Any) -> Any:
        if argument and "files" in argument:
            argument["files"] = [file["path"] for file in argument["files"]]
        match event:
            case "submit":
                return session.on_submit(argument, sent, *SETTINGS)
            case "retry":
                return session.on_retry(sent, *SETTINGS)
            case "edit":
                return session.on_edit(SimpleNamespace(**argument), sent, *SETTINGS)
            case "change":
                return session.on_choose(argument)
            case "input":
                return session.on_model(0, sent)
            case "edit_tab":
                return session.on_change(argument, "Put it at night.", 0)
            case _:
                return getattr(session, f"on_{event}")(sent)

    async def _deliver(self, tab: Tab, event: str, updates: asyncio.Queue[Any]) -> None:
        while (update := await updates.get()) is not None:
            await self.steps.wait()
            if event == "edit_tab":
                tab.gallery = [path for path, _ in update[0]]
            elif tab.is_open:
                update = update[0] if event == "input" else update
                self.act(tab.name, "refuse" if event == "change" else "update", update)


def tokens(text: str) -> frozenset[str]:
    """What a visitor typed, of a text."""
    return frozenset(re.findall(r"w\d+[a-z]*", text))
