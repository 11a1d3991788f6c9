"""What the page's buttons do, against the real backend over a real socket; and its sentences when there is none."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from seed_multimodal.errors import ConfigError, RequestError
from seed_multimodal.serving.app import create_app
from seed_multimodal.serving.client import Model, together
from seed_multimodal.serving.dialogue import KINDS, Shown, Turn, kind_of, messages
from seed_multimodal.serving.page import build
from seed_multimodal.serving.visits import STILL, STOPPED, Page, Visit, shown, strip

PLAIN = (False, None, 1, 64, 0.0, 0.5, 3)  # force, ratio, beams, tokens, temperature, top_p, rounds
FORCED = (True, *PLAIN[1:])


@pytest.fixture(scope="module")
def address(tiny) -> Iterator[str]:
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, create_app(tiny), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/generate"
    server.shutdown()
    thread.join()


@pytest.fixture()
def page(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return Page([Model(address, KINDS["nano"])])


@pytest.fixture()
def file(picture: Image.Image, tmp_path: Path) -> str:
    picture.save(tmp_path / "stripes.png")
    return str(tmp_path / "stripes.png")


def all_of(updates: AsyncIterator[Any]) -> list[Any]:
    async def gather() -> list[Any]:
        return [update async for update in updates]

    return asyncio.run(gather())


def send(page: Page, visit: Visit, text: str, *files: str, settings: tuple[Any, ...] = PLAIN) -> list[Any]:
    return all_of(page.on_submit(visit, {"text": text, "files": list(files)}, *settings))


def contents(turns: list[Turn]) -> list[Any]:
    return [message["content"] for message in shown(turns)]


# ---- turns


def test_messages_send_known_codes() -> None:
    turns = [Turn([Shown("a.png"), "What?"]), Turn(["A ", Shown("b.png", [1, 2])])]
    assert messages(turns, ("Q: ", ""), lambda path: f"bytes of {path}") == [
        {"role": "user", "content": [
            {"type": "text", "text": "Q: "},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,bytes of a.png"}},
            {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A "}, {"type": "image_url", "codes": [1, 2]}]}]


def test_turn_joins_what_a_stream_brings() -> None:
    def image(codes: int, preview: bool) -> dict[str, Any]:
        return {"images": [{"image_url": {"url": f"{codes}.png"}, "codes": [1] * codes, "preview": preview}]}

    turn = Turn([])
    for change in ({"content": "Here"}, {"content": " it is. "}, image(8, True), image(32, False), image(8, True),
                   {"notes": ["An image broke off."]}):
        turn.add(change, str)
    assert [one.path for one in turn.images] == ["32.png", "8.png"]
    turn.end()
    assert contents([turn]) == [["Here it is.", {"path": "32.png", "alt_text": "image"}, "An image broke off."]]


def test_kind_of_names_the_models() -> None:
    with pytest.raises(ConfigError, match="seed-llama-8b"):
        kind_of("other")


def test_strip_gives_equal_codes_equal_colours() -> None:
    fields = strip([7, 1000, 7]).split("<span")[1:]
    colours = [field.split('style="')[1].split('"')[0] for field in fields]
    assert colours[0] == colours[2] != colours[1] and 'aria-label="codes 7, 1000, 7"' in strip([7, 1000, 7])


# ---- the chat


def test_on_submit_keeps_a_conversation_with_images_both_ways(page: Page, file: str) -> None:
    visit = Visit()
    updates = send(page, visit, "What is it?", file, file)
    assert "Waiting" in updates[0][1] and updates[0][2]["stop_btn"] and not updates[-1][2]["stop_btn"]
    assert [message["role"] for message in updates[-1][0]] == ["user", "assistant"]
    first, second, text = updates[0][0][0]["content"]
    assert first == second and Path(first["path"]).is_file() and text == "What is it?"
    drafts = [update[0][3]["content"] for update in send(page, visit, "Make it green.", settings=FORCED)[1:]]
    drawn = [[part["path"] for part in draft if isinstance(part, dict)] for draft in drafts]
    assert len({path for paths in drawn for path in paths}) >= 3, "previews, then the image"
    assert Image.open(drawn[-1][0]).size == (16, 16)
    assert len(visit.turns[-1].images[0].codes) == 32  # which later turns send


def test_on_retry_edit_and_undo_change_the_conversation(page: Page, file: str) -> None:
    visit = Visit()
    send(page, visit, "Please draw a fish.", file, settings=FORCED)
    before = visit.turns[1].images[0].path
    all_of(page.on_retry(visit, *FORCED))
    assert len(visit.turns) == 2 and visit.turns[1].images[0].path != before  # another seed
    send(page, visit, "And?")
    edited: Any = SimpleNamespace(index=(0, 0), value="What is it?")
    all_of(page.on_edit(visit, edited, *PLAIN))
    assert len(visit.turns) == 2 and visit.turns[0].parts[1:] == ["What is it?"] and visit.turns[0].images
    _, _, box = page.on_undo(visit)
    assert visit.turns == [] and box["value"]["text"] == "What is it?" and len(box["value"]["files"]) == 1
    assert send(page, visit, box["value"]["text"], *box["value"]["files"]) and len(visit.turns) == 2


@pytest.mark.parametrize("text", ["", " ?.", "an <image> here"])
def test_on_submit_refuses_a_message_and_keeps_it_in_its_box(page: Page, text: str) -> None:
    visit = Visit()
    (chat, said, box), = send(page, visit, text)
    assert visit.turns == [] and "alert" in said and "value" not in box and "value" not in chat


def test_on_submit_gives_the_message_back_without_a_backend(page: Page, address: str, file: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        page.models[0].address = f"http://127.0.0.1:{free.getsockname()[1]}/generate"
        visit = Visit()
        chat, said, box = send(page, visit, "hello", file)[-1]
    assert "start the backend" in said and chat == [] and box["value"] == {"text": "hello", "files": [file]}
    assert visit.turns == [] and not visit.busy
    page.models[0].address = address
    send(page, visit, "anybody?")
    assert len(visit.turns) == 2
    before = contents(visit.turns)
    page.models[0].address = address.replace("generate", "elsewhere")
    assert "URL was not found" in all_of(page.on_retry(visit, *PLAIN))[-1][1]
    assert contents(visit.turns) == before


def test_on_submit_refuses_a_long_history(page: Page) -> None:
    visit = Visit()
    for _ in range(2):
        last = send(page, visit, "again", settings=(*PLAIN[:-1], 1))[-1]
    assert "clear history" in last[1] and len(visit.turns) == 2


@pytest.mark.parametrize("stop", [Visit.stop, Visit.forget])
def test_stop_and_clear_end_an_answer(page: Page, stop: Any) -> None:
    visit = Visit()

    async def stopped() -> list[Any]:
        updates = []
        async for update in page.on_submit(visit, {"text": "Please draw a fish.", "files": []}, *FORCED):
            updates.append(update)
            if len(updates) == 2:  # the first words
                refused = [one async for one in page.on_submit(visit, {"text": "x", "files": []}, *PLAIN)]
                assert STILL in refused[0][1]
                stop(visit)
        return updates

    last = asyncio.run(stopped())[-1]
    assert last[0] == shown(visit.turns) and not visit.running and not visit.busy and not last[2]["stop_btn"]
    assert [turn.below for turn in visit.turns] == ([[], [STOPPED]] if stop is Visit.stop else [])
    visit.forget()
    send(page, visit, "Hello")
    assert len(visit.turns) == 2


def test_on_choose_names_a_file_that_is_no_image(page: Page, file: str, tmp_path: Path) -> None:
    (tmp_path / "fake.png").write_bytes(b"no picture")
    message = {"text": "x", "files": [file, str(tmp_path / "fake.png")]}
    said, left = asyncio.run(page.on_choose(Visit(), message))
    assert "fake.png" in said and left == {"text": "x", "files": [file]}


def test_forget_removes_the_visitors_images(page: Page, file: str, tmp_path: Path) -> None:
    visit = Visit()
    send(page, visit, "What is it?", file)
    assert len(list(tmp_path.rglob("*.png"))) == 2
    visit.forget()
    assert not list(tmp_path.rglob("*.png")) and visit.turns == []


def test_together_gives_pieces_and_errors_of_all_streams() -> None:
    async def stream(number: int) -> AsyncIterator[int]:
        yield number
        if number:
            raise RequestError("broken")

    found = all_of(together([stream(0), stream(1)], set()))
    assert [one for one in found if isinstance(one[1], int)] == [(0, 0), (1, 1)]
    assert [(number, str(error)) for number, error in found if isinstance(error, RequestError)] == [(1, "broken")]


def test_client_names_what_is_wrong(address: str) -> None:
    for wrong, route, sentence in (
            (address, "/elsewhere", "URL was not found"), ("127.0.0.1", "", "is no address"),
            (address, "/v1/chat/completions", "messages: Field required"), (address, "/metrics", "without JSON")):
        with pytest.raises(RequestError, match=sentence):
            all_of(Model(wrong, KINDS["nano"]).ask(route, **({} if route == "/metrics" else {"json": {}})))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_build_opens_no_connection(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"building the page opened a connection: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    demo = build(page := Page([Model("", kind_of(name))]))
    *_, draw, edit, codes, find = asyncio.run(page.on_model(Visit(), 0, SimpleNamespace(session_hash="")))
    tabs = {"draw": draw, "edit": edit, "codes": codes, "find": find}
    assert [tab for tab, update in tabs.items() if update["visible"]] == [*KINDS[name].can]
    sliders = {block.label: block for block in demo.blocks.values() if type(block).__name__ == "Slider"}
    assert {"Beams", "Temperature", "Top P", "Most new tokens"} <= set(sliders)
    assert sliders["Most rounds of history"].value == (5 if name == "nano" else 3)
