"""What the page's buttons do, against the real backend over a real socket; and its sentences when there is none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from seed_multimodal.errors import RequestError
from seed_multimodal.serving.app import create_app
from seed_multimodal.serving.chat_page import KINDS, ChatPage, kind_of
from seed_multimodal.serving.client import follow_generate
from seed_multimodal.serving.gradio_app import build_demo

ASKED = {"max_turns": 3, "force_boi": False, "num_beams": 1, "max_new_tokens": 64, "temperature": 0.0, "top_p": 0.5}


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
def page(address: str, tmp_path: Path) -> ChatPage:
    return ChatPage(address, KINDS["nano"], tmp_path)


@pytest.fixture()
def file(picture: Image.Image, tmp_path: Path) -> str:
    picture.save(tmp_path / "stripes.png")
    return str(tmp_path / "stripes.png")


def ended(ask: Any, dialogue: Any, **settings: Any) -> str:
    """Run a button's work to its end; what it says."""
    made = ask(dialogue, **settings)
    while True:
        try:
            next(made)
        except StopIteration as end:
            return end.value


def test_answer_keeps_a_conversation_with_images_both_ways(page: ChatPage, file: str) -> None:
    dialogue = page.new_dialogue()
    assert page.add(dialogue, file, "What is it?") == ""
    assert ended(page.answer, dialogue, **ASKED) == ""
    shown = page.messages(dialogue)
    assert [message["role"] for message in shown] == ["user", "assistant"]
    assert Path(shown[0]["content"][0]["path"]).is_file() and shown[0]["content"][1] == "What is it?"
    assert page.add(dialogue, None, "Make it green.") == ""
    assert ended(page.answer, dialogue, **{**ASKED, "force_boi": True}) == ""
    drawn = page.messages(dialogue)[3]["content"]
    assert Image.open(drawn[1]["path"]).size == (16, 16)
    assert all(codes is not None for entry in dialogue.conversation.messages
               for codes in entry["message"]["images_ids"])  # later turns send codes, not images


def test_answer_yields_previews_in_the_place_of_the_image(page: ChatPage, tmp_path: Path) -> None:
    dialogue, seen = page.new_dialogue(), []
    page.add(dialogue, None, "Please draw a fish.")
    for previews in page.answer(dialogue, **{**ASKED, "force_boi": True}):
        shown = page.messages(dialogue, previews)
        assert [message["role"] for message in shown] == ["user", "assistant"]
        seen.append(Image.open(shown[1]["content"][0]["path"]).tobytes())
    drawn = page.messages(dialogue)[1]["content"]
    assert len(seen) >= 2 and Image.open(drawn[1]["path"]).tobytes() not in seen[:2] and seen[0] != seen[1]
    assert {Path(drawn[1]["path"])} <= set(tmp_path.rglob("*.png"))
    assert len(list(tmp_path.rglob("*.png"))) == sum(isinstance(part, dict) for part in drawn)  # no preview is kept


@pytest.mark.parametrize("pieces", [1, 2])
def test_answer_leaves_a_cleared_dialogue_empty(page: ChatPage, pieces: int) -> None:
    dialogue = page.new_dialogue()
    page.add(dialogue, None, "Please draw a fish.")
    made = page.answer(dialogue, **{**ASKED, "force_boi": True})
    for _ in range(pieces):
        next(made)  # a preview
    dialogue.clear()
    assert list(made) == [] and page.messages(dialogue) == []
    page.add(dialogue, None, "Hello")
    assert ended(page.answer, dialogue, **ASKED) == "" and len(page.messages(dialogue)) == 2


def test_add_refuses_while_an_answer_is_awaited(page: ChatPage, file: str) -> None:
    """It would seem to be answered, and an image would make the answer fit no more."""
    dialogue = page.new_dialogue()
    page.add(dialogue, None, "Please draw a fish.")
    made = page.answer(dialogue, **{**ASKED, "force_boi": True})
    next(made)  # a preview
    for refused in (page.add(dialogue, file, "And a dog."), ended(page.answer, dialogue, **ASKED),
                    ended(page.regenerate, dialogue, **ASKED)):
        assert "still answering" in refused
    list(made)
    shown = page.messages(dialogue)
    assert [message["role"] for message in shown] == ["user", "assistant"]
    assert shown[0]["content"] == ["Please draw a fish."]
    assert page.add(dialogue, file, "And a dog.") == "" and ended(page.answer, dialogue, **ASKED) == ""
    page.add(dialogue, None, "Again")
    page.answer(dialogue, **ASKED).close()  # its visitor left before it was asked
    made = page.answer(dialogue, **{**ASKED, "force_boi": True})
    next(made)
    made.close()  # … and while it came
    assert page.add(dialogue, None, "or not") == ""


def test_regenerate_leaves_a_cleared_dialogue_empty(page: ChatPage) -> None:
    dialogue = page.new_dialogue()
    page.add(dialogue, None, "hello")
    ended(page.answer, dialogue, **ASKED)

    def fails(*_: Any) -> Iterator[dict[str, Any]]:
        dialogue.clear()
        raise RequestError("The model did not answer.")
        yield {}

    page.post = fails
    assert ended(page.regenerate, dialogue, **ASKED) == "" and page.messages(dialogue) == []


def test_add_reports_an_unreadable_image(page: ChatPage, tmp_path: Path) -> None:
    dialogue = page.new_dialogue()
    assert "Write a message" in ended(page.answer, dialogue, **ASKED)
    (tmp_path / "fake.png").write_bytes(b"no picture")
    assert page.add(dialogue, str(tmp_path / "fake.png"), "x").startswith("fake.png")
    assert "do not type" in page.add(dialogue, None, "an <image> here")


def test_answer_refuses_a_long_history(page: ChatPage) -> None:
    dialogue = page.new_dialogue()
    for _ in range(2):
        page.add(dialogue, None, "again")
        assert ended(page.answer, dialogue, **{**ASKED, "max_turns": 1}) == ""
    assert "clear history" in page.messages(dialogue)[-1]["content"][0]
    dialogue.clear()
    assert page.messages(dialogue) == []


def test_answer_keeps_the_message_without_a_backend(page: ChatPage, address: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        page.address = f"http://127.0.0.1:{free.getsockname()[1]}/generate"
        dialogue = page.new_dialogue()
        page.add(dialogue, None, "hello")
        said = ended(page.answer, dialogue, **ASKED)
    assert "start the backend" in said and dialogue.waits()
    page.add(dialogue, None, "anybody?")
    page.address = address
    assert ended(page.answer, dialogue, **ASKED) == ""
    assert [message["content"] for message in page.messages(dialogue)][0] == ["hello anybody?"]


def test_regenerate_keeps_the_answer_after_a_failure(page: ChatPage, address: str) -> None:
    dialogue = page.new_dialogue()
    page.add(dialogue, None, "hello")
    ended(page.answer, dialogue, **ASKED)
    before = page.messages(dialogue)
    page.address = address.replace("generate", "elsewhere")
    assert "nothing at this address" in ended(page.regenerate, dialogue, **ASKED)
    assert page.messages(dialogue) == before
    page.address = address
    assert ended(page.regenerate, dialogue, **ASKED) == ""
    assert page.messages(dialogue) == before  # greedy: the same again


def test_follow_generate_names_what_is_wrong(address: str) -> None:
    with pytest.raises(RequestError, match="lacks 'images'"):
        list(follow_generate(address, {"text": "x"}))
    with pytest.raises(RequestError, match="nothing at this address"):
        list(follow_generate(address.replace("generate", "elsewhere"), {"text": "x"}))
    with pytest.raises(RequestError, match="is not an address"):
        list(follow_generate("127.0.0.1", {}))


def test_messages_show_a_broken_image_in_its_place(page: ChatPage) -> None:
    dialogue = page.new_dialogue()
    page.add(dialogue, None, "draw")
    page.post = lambda *a, **k: iter([{"text": "Here <image> done", "images": [""], "images_ids": [[1, 2]],
                                       "error_msg": ["An image has 2 codes instead of 32."]}])
    assert ended(page.answer, dialogue, **ASKED) == ""
    assert page.messages(dialogue)[1]["content"] == [
        "Here", "(an image that could not be drawn)", "done",
        "Some images failed: An image has 2 codes instead of 32."]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KINDS))
def test_build_demo_opens_no_connection(name: str, page: ChatPage, monkeypatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"building the page opened a connection: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    page.kind = kind_of(name)
    demo = build_demo(page)
    labels = {block.label for block in demo.blocks.values() if getattr(block, "label", None)}
    assert {"Image", "Message", "Conversation", "Beams", "Top P", "Force an image"} <= labels
    rounds = [block.value for block in demo.blocks.values() if getattr(block, "label", "") == "Most rounds of history"]
    assert rounds == [5 if name == "nano" else 3]
