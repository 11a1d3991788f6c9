"""What the page's buttons do: its handlers, called in process, against a backend on loopback."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from full_disk import file_size_limit
from PIL import Image
from random_images import noise
from served import Running, hostile_backend
from yaml_tables import read_tables

from seed_multimodal.errors import RequestError
from seed_multimodal.language.answer import left_out_note
from seed_multimodal.models.registry import model_cards
from seed_multimodal.serving import chat_session, turns

PLAIN = (False, None, 1, 64, 0.0, 0.5, 0)  # force, ratio, beams, tokens, temperature, top_p, rounds
FORCED = (True, *PLAIN[1:])


@pytest.fixture(scope="module")
def address(tiny) -> str:
    return Running(tiny).address


def session_of(address: str, card: str):
    model = chat_session.ModelClient(address, model_cards()[card])
    return chat_session.ChatSession([model], model)


@pytest.fixture
def session(address: str, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return session_of(address, "nano")


@pytest.fixture
def file(tmp_path) -> str:
    noise(0).save(tmp_path / "noise.png")
    return str(tmp_path / "noise.png")


def all_of(updates: AsyncIterator[Any]) -> list:
    async def gather() -> list:
        return [update async for update in updates]

    return asyncio.run(gather())


def send(session, text, *files: str, settings: tuple = PLAIN) -> list:
    session.on_submit({"text": text, "files": list(files)})
    return all_of(session.reply(*settings))


def event(index, **values):
    """Gradio's event of a click in a component."""
    return SimpleNamespace(index=index, **values)


# ---- how a backend is reached

TABLES = read_tables(__file__)


@pytest.mark.parametrize("environment", TABLES["proxies"], ids=str)
def test_a_backend_on_this_machine_is_reached_without_proxy(session, monkeypatch, environment):
    # Company machines and VPN tools set these, mostly without `no_proxy`.
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asyncio.run(session.model.load_card())
    assert session.model.codes_per_image == 32


@pytest.mark.parametrize("url, environment, reason", TABLES["unreached"])
def test_a_backend_that_is_not_reached_says_why(
    session, address, monkeypatch, url, environment, reason
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    session.model.address = url.format(address=address.removesuffix("/generate"))
    with pytest.raises(RequestError, match=reason):
        asyncio.run(session.model.load_card())


# ---- what is shown


@pytest.mark.slow
def test_boxes_are_drawn_on_the_last_image_and_not_written(file):
    box = {"image": 0, "box": [0.375, 0.1875, 0.625, 0.3125]}
    picture = turns.Picture([5], description="a cat")
    picture.path = file
    drawing = chat_session.image_with_boxes([turns.Turn("user", [picture])], [box])
    assert drawing.getpixel((18, 5)) == drawing.getpixel((29, 9)) == (0, 255, 0)
    assert drawing.getpixel((24, 7)) == noise(0).getpixel((24, 7))
    text = "a cat <box_start><loc-8><loc-4><loc-4><loc-2><box_end>"
    turn = turns.Turn("assistant", [text, picture], ["A note."], "a dog: no")
    reasoning, answer, read_back, note = turn.displayed()
    assert reasoning["content"] == "a dog: no" and reasoning["metadata"]["status"] == "done"
    assert answer["content"][0] == "a cat" and note["metadata"] == {"title": "A note."}
    # What a drawing shows stands below it, folded, also after a reload.
    assert read_back["content"] == "a cat" and read_back["metadata"]["status"] == "done"
    (again,) = turns.restored({"model": "", "turns": turns.stored_turns([turn])}).turns
    assert again.pictures[0].description == "a cat"
    assert again.message()["reasoning_content"] == "a dog: no"


# ---- a conversation (retry, undo and edit: tests/e2e/test_browser.py)


def test_reply_keeps_a_conversation_with_images_both_ways(session, file):
    (_, chat, box), *growing, (*_, end) = send(session, "What is it?", file, file)
    assert len({str(messages) for _, messages, _ in growing}) > 3
    assert box["stop_btn"] and box["value"] is None and not end["stop_btn"]
    assert [message["role"] for message in chat] == ["user", "assistant"]
    text, first, second, _ = chat[0]["content"]
    assert first == second and Path(first["path"]).is_file() and text == "What is it?"
    updates = send(session, "Make it green.", settings=FORCED)[1:]
    paths = [
        part["path"] for _, chat, _ in updates for part in chat[3]["content"] if "path" in part
    ]
    assert len({*paths}) >= 3, "previews, then the image"
    assert Image.open(paths[-1]).size == (16, 16)
    # Previews are replaced by their image, whose codes later turns send.
    answer = session.turns[-1]
    assert len(answer.pictures[0].codes) == 32
    # That the oldest messages are left out is noted once.
    session.turns[1].notes, answer.notes = [left_out_note(2, "8 tokens")], []
    change = {"notes": [left_out_note(4, "8 tokens"), "What is a zebra?"]}
    asyncio.run(session.add_change(answer, change))
    assert answer.notes == ["What is a zebra?"]


@pytest.mark.parametrize("system", ["tiny", "tiny_x"])
def test_a_reload_continues_the_conversation(session, address, file, system, request, monkeypatch):
    # The browser keeps texts and codes, of which images are drawn; else small images (SEED-X).
    session.model.address = Running(request.getfixturevalue(system)).address
    asyncio.run(session.model.load_card())
    send(session, "What is it?", file)
    *_, (stored, chat, _) = send(session, "Make it green.", settings=FORCED)
    assert len(json.dumps(stored)) < 10_000
    # Not the first model's page, but that of the conversation.
    reloaded = session_of(address, "nano")
    reloaded.models.append(session.model)
    asyncio.run(reloaded.on_model(0, stored))
    assert turns.stored_turns(reloaded.turns) == stored["turns"]
    assert len(reloaded.displayed()) == len(chat)
    pictures = [picture for turn in reloaded.turns for picture in turn.pictures]
    assert pictures and all(Path(picture.path).is_file() for picture in pictures)
    assert reloaded.conversation_id == stored["id"]
    # A conversation with a model that is gone stays in the list; a new one does not replace it.
    with pytest.warns(UserWarning, match="No backend serves another"):
        index = reloaded.models.index(reloaded.model)
        asyncio.run(reloaded.on_model(index, {**stored, "model": "another"}))
    assert reloaded.turns == [] and reloaded.conversation_id != stored["id"]
    # A message whose answer the reload ended returns to its box.
    session.on_submit({"text": "And?", "files": [file]})
    updates = asyncio.run(reloaded.on_model(1, session.stored()))
    assert len(updates[3]["value"]) == len(chat) and updates[4]["value"]["text"] == "And?"
    session.on_stop()
    # Large images are reduced, and the oldest are left out of a full storage.
    monkeypatch.setattr(turns, "SHORT_URL", 0)
    session.turns[0].pictures[0].stored_url = ""
    (part, _) = session.stored()["turns"][0]["parts"]
    assert "codes" in part or part["url"].startswith("data:image/webp")
    monkeypatch.setattr(turns, "STORED_CHARACTERS", 0)
    (part, _) = session.stored()["turns"][0]["parts"]
    assert "codes" in part or part == turns.DROPPED


def test_a_new_session_continues_what_the_browser_has(session, address):
    # The page's program was started again while a tab was open.
    asyncio.run(session.model.load_card())
    *_, (stored, *_) = send(session, "What is it?")
    restarted = session_of(address, "nano")
    restarted.on_submit({"text": "And?", "files": []}, stored)
    assert len(restarted.turns) == 4 and restarted.conversation_id == stored["id"]


def test_lavit_draws_in_the_chosen_ratio(tiny_lavit, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    session = session_of(Running(tiny_lavit).address, "nano-lavit")
    send(session, "a red apple", settings=(True, "3:2", *PLAIN[2:]))
    (drawing,) = session.turns[-1].pictures
    assert Image.open(drawing.path).size == (80, 56) and drawing.codes


@pytest.mark.parametrize("text", ["", " ?.", "an <image> here"])
def test_on_submit_refuses_a_message(session, text):
    with pytest.raises(gr.Error):
        send(session, text)
    assert session.turns == []


def test_a_retry_that_fails_leaves_the_answer(session, address):
    *_, (*before, _) = send(session, "anybody?")
    session.model.address = address.replace("generate", "elsewhere")
    session.on_retry()
    with pytest.warns(UserWarning, match="address"):
        *_, (*after, _) = all_of(session.reply(*PLAIN))
    assert after == before and len(before[1]) == 2


@pytest.mark.parametrize("updates, clear", [(0, False), (1, False), (2, False), (2, True)])
def test_reply_ends_where_it_is_cancelled(session, updates, clear):
    # As Gradio does it for Stop: without an answer the message returns, part of one stays.
    async def stopped():
        session.on_submit({"text": "Please draw a fish.", "files": []})
        reply = session.reply(*FORCED)
        for _ in range(updates):
            kept.append((await anext(reply))[0])
        for again in (lambda: session.on_submit({"text": "Hi", "files": []}), session.on_retry):
            with pytest.raises(gr.Error, match="is being made"):
                again()
        # Gradio cancels the answer some time later.
        end = session.on_new() if clear else session.on_stop()
        # If it does not, its last update is what is shown already.
        late = [update async for update in reply] if updates else []
        assert late == ([] if clear or not updates else [end])
        return end

    kept: list[dict] = []
    stored, chat, box = asyncio.run(stopped())
    assert stored["turns"] == turns.stored_turns(session.turns)
    # A reload in the middle ends an answer as Stop does; a new chat is another conversation.
    if updates == 2:
        assert (stored == kept[-1]) == (stored["id"] == kept[-1]["id"]) == (not clear)
    assert ("value" in box) == (updates < 2)
    if not updates:  # an answer taken back before its begin
        assert all_of(session.reply(*FORCED)) == [(stored, chat, box)]
    assert len(chat) == (3 if updates > 1 and not clear else 0)
    assert not chat or chat[2]["metadata"]["title"] == "Stopped."
    n_turns = len(session.turns)
    send(session, "Hello")
    assert len(session.turns) == n_turns + 2


@pytest.mark.parametrize("updates", [0, 1, 2])
def test_an_answer_that_is_overtaken_by_undo_leaves_what_undo_shows(session, updates):
    # A browser that asked for the answer before it knew of Undo applies both, in either order.
    async def overtaken():
        session.on_retry()
        reply = session.reply(*FORCED)
        for _ in range(updates):
            await anext(reply)
        end = session.on_undo()
        return end, [update async for update in reply]

    send(session, "What is it?")
    end, late = asyncio.run(overtaken())
    assert late == [end] and end[2]["value"]["text"] == "What is it?"
    assert session.turns == [] and session.before is None


def test_uploads_are_checked_and_removed_with_the_conversation(session, tmp_path, monkeypatch):
    # What visitors have shown does not stay on the disk; of many uploads the oldest go before.
    monkeypatch.setattr(chat_session, "MAX_UPLOADS", 2)
    files = [tmp_path / f"{seed}.png" for seed in range(4)]
    for seed, path in enumerate(files):
        noise(seed).save(path)
    send(session, "What is it?", str(files[0]))
    # A file that is no image is named at once, not when the message is sent.
    chosen = [str(path) for path in files[1:]]
    fake = tmp_path / "fake.jpg"
    fake.write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"fake\.jpg"):
        message = session.on_choose({"text": "x", "files": [*chosen, str(fake)]})
    assert message == {"text": "x", "files": chosen}
    assert [path.exists() for path in files] == [False, False, True, True]
    assert session.turns[0].pictures and len([*tmp_path.rglob("*.png")]) == 5
    session.reset()
    assert [*tmp_path.rglob("*.png")] == session.turns == []


# ---- strangers

PARTS = """\
5
{"path": "README.md", "codes": [1]}
{"codes": {"path": "README.md", "meta": {"_type": "gradio.FileData"}}}
{"codes": [-1]}
{"url": "README.md"}
{"stored_url": "file:///README.md"}
"half of a pair: \\ud800"
{"description": {"path": "README.md", "meta": {"_type": "gradio.FileData"}}}"""
LONG = [json.dumps({"codes": [0] * 5000}), json.dumps("x" * 5_000_000)]


def reload_with(session, *parts):
    """The updates of a reload, without a backend, of a message that a browser sends back."""
    session.model.address = "127.0.0.1:9"
    turn = {"role": "user", "parts": [*parts], "notes": []}
    return asyncio.run(session.on_model(0, {"model": "", "turns": [turn]}))


@pytest.mark.parametrize("part", [*PARTS.splitlines(), *LONG], ids=lambda part: part[:40])
def test_a_stored_conversation_that_is_not_the_pages_is_left_out(session, part):
    with pytest.warns(UserWarning, match="copy of the chat cannot be read: (turns.0.parts.0|it)"):
        _, title, *_ = reload_with(session, json.loads(part))
    assert session.turns == [] and title["value"].startswith("# SEED nano")


@pytest.mark.filterwarnings("ignore:")
def test_stored_images_that_cannot_be_drawn_are_not_shown(session):
    damaged = {"url": f"data:image/png;base64,{'A' * 30_000}"}
    updates = reload_with(session, {}, {"codes": [1]}, damaged, "Hi")
    assert updates[4]["value"] == {"text": "Hi", "files": []}


ANSWERS = """\
[]
{"data": 5}
{"error": 5}
{"choices": [{"delta": {"content": {"path": "README.md"}}}]}
{"choices": [{"delta": {"reasoning_content": {"path": "README.md"}}}]}
{"choices": [{"delta": {"notes": [{"path": "README.md"}]}}], "data": [{"b64_json": "README.md"}]}
{"choices": [{"delta": {"boxes": [{"box": [0, 0, 1e999, 1]}]}}]}
{"choices": [{"delta": {"images": [{"image_url": {"url": "README.md"}, "preview": true}]}}]}
{"data": [{"codes": {"path": "README.md", "meta": {"_type": "gradio.FileData"}}}]}"""


@pytest.mark.parametrize("answer", ANSWERS.splitlines())
@pytest.mark.filterwarnings("ignore:")
def test_what_a_broken_backend_answers_is_not_shown(session, address, file, answer):
    with hostile_backend(answer) as port:
        session.model.address = f"http://127.0.0.1:{port}"
        files = [file] if "codes" in answer else []
        *_, (stored, chat, box) = send(session, "Hi", *files)
        assert asyncio.run(session.on_codes(file)) == ("", [])
        assert asyncio.run(session.on_draw("a fox", 0, None)) == chat_session.NO_UPDATES
    assert (stored["turns"], chat, box["value"]["text"]) == ([], [], "Hi")
    assert len(box["value"]["files"]) == len(files)
    session.model.address = address
    send(session, "Hi")
    assert len(session.turns) == 2


# ---- tabs and examples


def test_an_example_is_answered_and_offers_what_follows(session):
    # Examples without their images are not offered.
    for name, card in model_cards().items():
        assert session_of("", name).examples == [*card.examples] != []
    examples = session.examples
    index = next(n for n, example in enumerate(examples) if example.images and example.then)
    session.on_example(event(index))
    all_of(session.reply(*PLAIN))
    assert len(session.turns) == 2
    assert len(session.turns[0].pictures) == len(examples[index].images)
    (option,) = session.displayed()[-1]["options"]
    assert option["value"] == examples[index].then[0]
    session.on_option(event(0, **option))
    all_of(session.reply(*PLAIN))
    assert len(session.turns) == 4 and "options" not in session.displayed()[-1]


# ---- the log of votes


def test_votes_and_answers_are_logged(session, file, tmp_path, caplog):
    session.log = chat_session.ConversationLog(tmp_path / "log")
    send(session, "What is it?", file)
    send(session, "And?")
    session.turns[1].reasoning = "a dog: no"  # a message of its own
    for liked in (True, False, ""):
        asyncio.run(session.on_vote(event((2, 0), liked=liked)))
    (log,) = (tmp_path / "log").glob("*-conv.json")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    lengths = [(record["type"], len(record["state"]["messages"])) for record in records]
    votes = [("upvote", 2), ("downvote", 2), ("withdrawn", 2)]
    assert lengths == [("common", 2), ("common", 4), *votes]
    assert records[0]["settings"]["max_tokens"] == 64
    # A full disk does not end the chat.
    with file_size_limit(0):
        send(session, "And?")
        assert "is full" in caplog.text
        with pytest.warns(UserWarning, match="is full"):
            asyncio.run(session.on_vote(event((1, 0), liked=True)))
    assert len(session.turns) == 6


# ---- the page and its connections


@pytest.mark.filterwarnings("ignore:No model answers")
@pytest.mark.parametrize("name", sorted(model_cards()))
def test_build_opens_no_connection(name, monkeypatch):
    # Neither to gradio's servers nor to a backend; the page has what the model's card says.
    from seed_multimodal.serving.page import build

    def refuse(*args, **kwargs):
        raise AssertionError(f"building the page opened a connection: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    session = session_of("", name)
    card = session.model.card
    build([session.model])
    updates = asyncio.run(session.on_model(0, None))
    force, _, beams, _, temperature, _, rounds, shape, _, _, _, *tabs = updates[6:]
    names = ("draw", "edit", "codes", "find")
    shown = [name for name, update in zip(names, tabs, strict=True) if update["visible"]]
    assert shown == [*card.tabs] and shape["visible"] == ("lavit" in name)
    assert [temperature["value"], rounds["value"]] == [card.temperature, card.max_rounds]
    assert not force and beams["visible"] == ("lavit" not in name)
    assert not updates[5]["visible"], "what a model without known words can draw"


def test_known_panel_escapes_what_a_backend_names():
    panel = chat_session.known_panel({"<a>": ["x"], "things": ["dog", "<b>"]})
    assert "dog.webp" in panel and "<b>" not in panel and panel.index("dog") < panel.index("&lt;a")
