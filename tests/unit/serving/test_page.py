"""What the page's buttons do, against the real backend over a real socket.

And its sentences when there is none.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from full_disk import file_size_limit
from gradio.state_holder import SessionState
from PIL import Image

from seed_multimodal.errors import RequestError
from seed_multimodal.models.registry import model_cards
from seed_multimodal.serving.app import create_app
from seed_multimodal.serving.chat_session import (
    ChatSession,
    add_change,
    chatbot_messages,
    code_strip,
    installed_examples,
)
from seed_multimodal.serving.client import ModelClient
from seed_multimodal.serving.conversation_log import ConversationLog
from seed_multimodal.serving.page import build

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
def session(address: str, tmp_path, monkeypatch) -> ChatSession:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return ChatSession([model := ModelClient(address, model_cards()["nano"])], model)


@pytest.fixture()
def file(stripes: Image.Image, tmp_path) -> str:
    stripes.save(tmp_path / "stripes.png")
    return str(tmp_path / "stripes.png")


def all_of(updates: AsyncIterator[Any]) -> list[Any]:
    async def gather() -> list[Any]:
        return [update async for update in updates]

    return asyncio.run(gather())


def send(
    session: ChatSession, text: str, *files: str, settings: tuple[Any, ...] = PLAIN
) -> list[Any]:
    session.on_submit({"text": text, "files": list(files)})
    return all_of(session.reply(*settings))


def images(message: Any) -> list[Any]:
    return [part for part in message["content"] if "path" in part]


def test_extend_joins_what_a_stream_brings():
    def image(codes: int, preview: bool) -> dict[str, Any]:
        return {"images": [{"path": f"{codes}.png", "codes": [1] * codes, "preview": preview}]}

    answer: Any = {"role": "assistant", "content": [], "below": []}
    for change in (
        {"content": "Here"},
        {"content": " it is. "},
        image(8, True),
        image(32, False),
        image(8, True),
        {"notes": ["An image broke off."]},
    ):
        add_change(answer, change)
    assert [entry["path"] for entry in images(answer)] == ["32.png", "8.png"]
    add_change(answer, {"content": "And"})
    assert [
        part if isinstance(part, str) else part["path"]
        for part in chatbot_messages([answer])[0]["content"]
    ] == ["Here it is.", "32.png", "8.png", "And", "An image broke off."]


def test_strip_gives_equal_codes_equal_colours():
    fields = code_strip([7, 1000, 7]).split("<span")[1:]
    colours = [field.split('style="')[1].split('"')[0] for field in fields]
    assert colours[0] == colours[2] != colours[1] and 'aria-label="codes 7, 1000, 7"' in code_strip(
        [7, 1000, 7]
    )


def test_reply_keeps_a_conversation_with_images_both_ways(session: ChatSession, file: str):
    (chat, box), *_ = send(session, "What is it?", file, file)
    assert box["stop_btn"] and box["value"] is None and not session.on_end()[1]["stop_btn"]
    assert [message["role"] for message in chat] == ["user", "assistant"] and chat[1][
        "content"
    ] == ["…"]
    first, second, text = chat[0]["content"]
    assert first == second and Path(first["path"]).is_file() and text == "What is it?"
    drafts = [
        update[0][3]["content"] for update in send(session, "Make it green.", settings=FORCED)[1:]
    ]
    drawings = [[part["path"] for part in draft if isinstance(part, dict)] for draft in drafts]
    assert len({path for paths in drawings for path in paths}) >= 3, "previews, then the image"
    assert Image.open(drawings[-1][0]).size == (16, 16)
    assert len(images(session.turns[-1])[0]["codes"]) == 32  # which later turns send


def test_on_retry_edit_and_undo_change_the_conversation(session: ChatSession, file: str):
    send(session, "Please draw a fish.", file, settings=FORCED)
    before = Path(images(session.turns[1])[0]["path"]).read_bytes()
    session.on_retry()
    all_of(session.reply(*FORCED))
    assert (
        len(session.turns) == 2 and Path(images(session.turns[1])[0]["path"]).read_bytes() != before
    )  # another seed
    send(session, "And?")
    edited: Any = SimpleNamespace(index=(0, 0), value="What is it?")
    session.on_edit(edited)
    all_of(session.reply(*PLAIN))
    assert (
        len(session.turns) == 2
        and session.turns[0]["content"][1]["text"] == "What is it?"
        and images(session.turns[0])
    )
    session.on_undo()
    _, box = session.on_end()
    assert (
        session.turns == []
        and box["value"]["text"] == "What is it?"
        and len(box["value"]["files"]) == 1
    )
    assert send(session, box["value"]["text"], *box["value"]["files"]) and len(session.turns) == 2


@pytest.mark.parametrize("text", ["", " ?.", "an <image> here"])
def test_on_submit_refuses_a_message(session: ChatSession, text):
    with pytest.warns(UserWarning, match="Write a message|do not type"):
        assert send(session, text) == [
            (gr.skip(), gr.skip())
        ]  # a value, as Gradio empties the box without one
    assert session.turns == session.pending == []


def test_reply_gives_the_message_back_without_a_backend(
    session: ChatSession, address: str, file: str
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        session.model.address = f"http://127.0.0.1:{free.getsockname()[1]}/generate"
        with pytest.warns(UserWarning, match="start the backend"):
            send(session, "hello", file)
    chat, box = session.on_end()
    assert chat == [] and box["value"]["text"] == "hello" and len(box["value"]["files"]) == 1
    session.model.address = address
    send(session, "anybody?")
    before = chatbot_messages(session.turns)
    session.model.address = address.replace("generate", "elsewhere")
    session.on_retry()
    with pytest.warns(UserWarning, match="is the address right"):
        all_of(session.reply(*PLAIN))
    assert session.on_end()[0] == before and len(before) == 2


def test_reply_refuses_a_long_history(session: ChatSession):
    send(session, "again", settings=(*PLAIN[:-1], 1))
    with pytest.warns(UserWarning, match="clear history"):
        send(session, "again", settings=(*PLAIN[:-1], 1))
    assert len(session.turns) == 2


@pytest.mark.parametrize(("updates", "clear"), [(1, False), (2, False), (2, True)])
def test_reply_ends_where_it_is_cancelled(session: ChatSession, updates, clear):
    """As Gradio does it for Stop: without an answer the message returns, part of one stays."""

    async def stopped() -> None:
        session.on_submit({"text": "Please draw a fish.", "files": []})
        reply = session.reply(*FORCED)
        for _ in range(updates):
            await anext(reply)
        if clear:
            session.reset()
        await reply.aclose()

    asyncio.run(stopped())
    (chat, box) = session.on_end()
    assert ("value" in box) == (updates == 1) and len(chat) == (
        2 if updates > 1 and not clear else 0
    )
    assert not chat or chat[1]["content"][-1] == "Stopped."
    send(session, "Hello")
    assert len(session.turns) == len(chat) + 2


def test_on_choose_names_a_file_that_is_no_image(session: ChatSession, file: str, tmp_path):
    (tmp_path / "fake.png").write_bytes(b"no picture")
    message = {"text": "x", "files": [file, str(tmp_path / "fake.png")]}
    with pytest.warns(UserWarning, match=r"fake\.png"):
        assert session.on_choose(message) == {"text": "x", "files": [file]}


def test_tabs_draw_edit_and_exchange_codes(session: ChatSession, file: str):
    drawings = asyncio.run(session.on_draw("a fish", 3, None))
    assert [caption for _, caption in drawings] == ["seed 3", "seed 4", "seed 5", "seed 6"]
    assert asyncio.run(session.on_change(file, "Make it green.", 0))[0][0].size == (16, 16)
    with pytest.warns(UserWarning, match="Choose an image first"):
        assert asyncio.run(session.on_change(None, "Make it green.", 0)) == []
    with pytest.warns(UserWarning, match="Choose an image first"):
        asyncio.run(session.on_swap([], [], 32, 32))
    with pytest.warns(UserWarning, match="Write a text first"):
        asyncio.run(session.on_draw(" ", 3, None))
    _, codes = asyncio.run(session.on_codes(file))
    assert len(codes) == 32 and asyncio.run(session.on_codes(None)) == ("", [])
    other = [*codes[::-1]]
    swapped = asyncio.run(session.on_swap(codes, other, 32, 32))
    assert [caption for _, caption in swapped] == ["first", "second"]
    assert (
        swapped[1][0].tobytes() == asyncio.run(session.on_swap([], codes, 32, 32))[0][0].tobytes()
    )


@pytest.mark.parametrize("name", sorted(model_cards()))
def test_examples_have_their_images(name):
    examples = model_cards()[name].examples
    assert installed_examples(examples) == [*examples] != []


def test_on_example_answers_it_and_offers_what_follows(session: ChatSession):
    examples = session.model.card.examples
    index = next(n for n, example in enumerate(examples) if example.images and example.then)
    example = examples[index]
    chosen: Any = SimpleNamespace(index=index)
    session.on_example(chosen)
    all_of(session.reply(*PLAIN))
    shown = images(session.turns[0])
    assert len(session.turns) == 2 and len(shown) == len(example.images)
    box = session.on_end()[1]
    assert box["value"] == {"text": example.then[0], "files": []}
    send(session, box["value"]["text"])
    assert len(session.turns) == 4 and "value" not in session.on_end()[1]

    session.on_example(chosen)
    send(session, "another message")
    assert "value" not in session.on_end()[1], "another message ends the example"


def test_votes_and_answers_are_logged(session: ChatSession, file: str, tmp_path):
    session.log = ConversationLog(tmp_path / "log")
    send(session, "What is it?", file)
    send(session, "And?")
    for liked in (True, False, ""):
        vote: Any = SimpleNamespace(index=(1, 0), liked=liked)
        asyncio.run(session.on_vote(vote))
    (log,) = (tmp_path / "log").glob("*-conv.json")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    lengths = [(record["type"], len(record["state"]["messages"])) for record in records]
    votes = [("upvote", 2), ("downvote", 2), ("withdrawn", 2)]
    assert lengths == [("common", 2), ("common", 4), *votes]
    assert records[0]["settings"]["max_tokens"] == 64
    (name,) = records[0]["state"]["messages"][0]["message"]["images"]
    assert (tmp_path / "log" / "images" / name).is_file()


def test_a_full_disk_of_the_log_does_not_end_the_chat(session: ChatSession, tmp_path, caplog):
    session.log = ConversationLog(tmp_path / "log")
    with file_size_limit(0):
        send(session, "What is it?")
        assert "is full" in caplog.text
        vote: Any = SimpleNamespace(index=(1, 0), liked=True)
        with pytest.warns(UserWarning, match="is full"):
            asyncio.run(session.on_vote(vote))
    send(session, "And?")
    assert len(session.turns) == 4


def test_reset_removes_the_visitors_images(session: ChatSession, file: str, tmp_path):
    send(session, "What is it?", file)
    assert len(list(tmp_path.rglob("*.png"))) == 2
    session.reset()
    assert [*tmp_path.rglob("*.png")] == [
        Path(file)
    ] and session.turns == []  # Gradio removes uploads after an hour


def test_client_names_what_is_wrong(address: str):
    for wrong, route, sentence in (
        (address, "/elsewhere", "is the address right"),
        ("127.0.0.1", "", "start the backend"),
        (address, "/v1/chat/completions", "Field required"),
        (address, "/metrics", "is the address right"),
    ):
        with pytest.raises(RequestError, match=sentence):
            all_of(
                ModelClient(wrong, model_cards()["nano"]).stream(
                    route, **({} if route == "/metrics" else {"body": {}})
                )
            )


@pytest.mark.filterwarnings("ignore:No model answers")
@pytest.mark.parametrize("name", sorted(model_cards()))
def test_build_opens_no_connection(name, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"building the page opened a connection: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    demo = build(models := [ModelClient("", kind := model_cards()[name])])
    updates = asyncio.run(ChatSession(models, models[0]).on_model(0))
    temperature, rounds, force, _, shape, *sliders_and_tabs = updates[4:]
    tabs = sliders_and_tabs[2:]
    names = ("draw", "edit", "codes", "find")
    assert [name for name, update in zip(names, tabs, strict=True) if update["visible"]] == [
        *kind.tabs
    ]
    assert (temperature, rounds, force, shape["visible"]) == (
        kind.temperature,
        kind.max_rounds,
        False,
        "lavit" in name,
    )
    # Gradio accepts them.
    (on_model,) = (fn for fn in demo.fns.values() if fn.name == "on_model")
    asyncio.run(demo.postprocess_data(on_model, updates, SessionState(demo)))
    sliders = {block.label for block in demo.blocks.values() if type(block).__name__ == "Slider"}
    assert {"Beams", "Temperature", "Top P", "Most new tokens", "Most rounds of history"} <= sliders
