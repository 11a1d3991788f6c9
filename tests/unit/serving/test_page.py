"""What the page's buttons do: its handlers, called in process, against a backend on loopback."""

import asyncio
import copy
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from full_disk import file_size_limit
from PIL import Image
from random_images import noise
from served import Running, hostile_backend
from yaml_tables import read_tables

from seed_multimodal.errors import RequestError
from seed_multimodal.language.answer import left_out_note
from seed_multimodal.models.registry import model_cards
from seed_multimodal.serving import chat, chat_session, turns

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


def all_of(updates: AsyncIterator[list]) -> list:
    """The snapshots of an event."""

    async def gather() -> list:
        return [update[-1] async for update in updates]

    return asyncio.run(gather())


def send(session, text, *files: str, settings: tuple = PLAIN) -> list:
    return all_of(session.on_submit({"text": text, "files": list(files)}, None, *settings))


def parts_of(message) -> list:
    """Texts and paths of a message as the browser gets it."""
    parts = []
    for part in message["content"]:
        parts.append(part["text"] if part["type"] == "text" else part["file"]["path"])
    return parts


def kept(snapshot) -> dict:
    """What the browser keeps of a snapshot and sends back."""
    return {name: snapshot[name] for name in ("id", "model", "turns", "revision")}


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
    drawing = turns.image_with_boxes([turns.Turn("user", [picture])], [box])
    assert drawing.getpixel((18, 5)) == drawing.getpixel((29, 9)) == (0, 255, 0)
    assert drawing.getpixel((24, 7)) == noise(0).getpixel((24, 7))
    text = "a cat <box_start><loc-8><loc-4><loc-4><loc-2><box_end>"
    turn = turns.Turn("assistant", [text, picture], ["A note."], "a dog: no")
    reasoning, answer, read_back, note = turn.displayed()
    assert reasoning["content"][0]["text"] == "a dog: no"
    assert reasoning["metadata"]["status"] == "done"
    assert answer["content"][0]["text"] == "a cat" and note["metadata"] == {"title": "A note."}
    # What a drawing shows stands below it, folded, also after a reload.
    assert read_back["content"][0]["text"] == "a cat" and read_back["metadata"]["status"] == "done"
    stored = {"id": "1", "model": "", "turns": turns.stored_turns([turn])}
    (again,) = turns.restored(stored).turns
    assert again.pictures[0].description == "a cat"
    assert again.message()["reasoning_content"] == "a dog: no"


# ---- a conversation (retry, undo and edit: tests/e2e/test_browser.py)


def test_on_submit_keeps_a_conversation_with_images_both_ways(session, file):
    first, *growing, end = send(session, "What is it?", file, file)
    assert len({str(update["messages"]) for update in growing}) > 3
    assert first["is_busy"] and not end["is_busy"]
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]
    text, *paths, _ = parts_of(end["messages"][0])
    assert paths[0] == paths[1] and Path(paths[0]).is_file() and text == "What is it?"
    updates = send(session, "Make it green.", settings=FORCED)
    answers = [parts_of(update["messages"][3]) for update in updates]
    paths = [part for parts in answers for part in parts if part.endswith(".png")]
    assert len({*paths}) >= 3, "previews, then the image"
    assert Image.open(paths[-1]).size == (16, 16)
    # Previews are replaced by their image, whose codes later turns send.
    answer = session.chat.turns[-1]
    assert len(answer.pictures[0].codes) == 32
    # That the oldest messages are left out is noted once.
    session.chat.turns[1].notes, answer.notes = [left_out_note(2, "8 tokens")], []
    change = {"notes": [left_out_note(4, "8 tokens"), "What is a zebra?"]}
    asyncio.run(session.add_change(session.chat, answer, change))
    assert answer.notes == ["What is a zebra?"]


@pytest.mark.parametrize("system", ["tiny", "tiny_x"])
def test_a_reload_continues_the_conversation(session, address, file, system, request, monkeypatch):
    # The browser keeps texts and codes, of which images are drawn; else small images (SEED-X).
    session.model.address = Running(request.getfixturevalue(system)).address
    asyncio.run(session.model.load_card())
    send(session, "What is it?", file)
    *_, end = send(session, "Make it green.", settings=FORCED)
    stored = kept(end)
    assert len(json.dumps(stored)) < 10_000
    # Not the first model's page, but that of the conversation.
    reloaded = session_of(address, "nano")
    reloaded.models.append(session.model)
    ((again,), *_) = asyncio.run(reloaded.on_model(0, stored))
    assert kept(again) == stored
    assert len(again["messages"]) == len(end["messages"])
    pictures = [picture for turn in reloaded.chat.turns for picture in turn.pictures]
    assert pictures and all(Path(picture.path).is_file() for picture in pictures)
    # A conversation with a model that is gone stays in the list; a new one is in its place.
    with pytest.warns(UserWarning, match="No backend serves another"):
        index = reloaded.models.index(reloaded.model)
        gone = {**stored, "id": "5", "model": "another"}
        ((*_, new), *_) = asyncio.run(reloaded.on_model(index, gone))
    assert new["turns"] == [] and new["id"] != new["replaces"] == "5"
    # A message whose answer a reload ended returns to its box.
    message = {"role": "user", "parts": [*stored["turns"][0]["parts"][:1], "And?"]}
    stored = {**stored, "id": "7", "turns": [*stored["turns"], message]}
    ((again,), *_) = asyncio.run(reloaded.on_model(index, stored))
    assert (
        len(again["messages"]) == len(end["messages"]) and again["returned"][-1]["text"] == "And?"
    )
    assert Path(again["returned"][-1]["files"][0]["path"]).is_file()
    # Large images are reduced, and the oldest are left out of a full storage.
    monkeypatch.setattr(turns, "SHORT_URL", 0)
    session.chat.turns[0].pictures[0].make_small()
    (part, _) = session.chat.snapshot()["turns"][0]["parts"]
    assert "codes" in part or part["url"].startswith("data:image/webp")
    monkeypatch.setattr(turns, "STORED_CHARACTERS", 0)
    (part, _) = session.chat.snapshot()["turns"][0]["parts"]
    assert "codes" in part or part == turns.DROPPED


def test_a_new_session_continues_what_the_browser_has(session, address):
    # The page's program was started again while a tab was open.
    asyncio.run(session.model.load_card())
    *_, end = send(session, "What is it?")
    restarted = session_of(address, "nano")
    message = {"text": "And?", "files": []}
    *_, again = all_of(restarted.on_submit(message, kept(end), *PLAIN))
    assert len(again["turns"]) == 4 and again["id"] == end["id"]


def test_lavit_draws_in_the_chosen_ratio(tiny_lavit, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    session = session_of(Running(tiny_lavit).address, "nano-lavit")
    send(session, "a red apple", settings=(True, "3:2", *PLAIN[2:]))
    (drawing,) = session.chat.turns[-1].pictures
    assert Image.open(drawing.path).size == (80, 56) and drawing.codes


@pytest.mark.parametrize("text", ["", " ?.", "an <image> here"])
def test_on_submit_returns_a_message_that_cannot_be_sent(session, text):
    with pytest.warns(UserWarning, match="message|<image>|&lt;image&gt;"):
        (update,) = send(session, text)
    assert update["returned"][-1]["text"] == text.strip() and update["turns"] == []


def test_a_retry_that_fails_leaves_the_answer(session, address):
    *_, before = send(session, "anybody?")
    session.model.address = address.replace("generate", "elsewhere")
    with pytest.warns(UserWarning, match="address"):
        *_, after = all_of(session.on_retry(None, *PLAIN))
    assert after["messages"] == before["messages"] and len(before["turns"]) == 2


@pytest.mark.filterwarnings("ignore:An answer is being made")
@pytest.mark.parametrize("end", ["stop", "undo", "close"])
@pytest.mark.parametrize("n_updates", [1, 2, 4])
def test_an_answer_that_is_not_awaited_ends(session, n_updates, end):
    async def ended():
        message = {"text": "Please draw a fish.", "files": []}
        answer = session.on_submit(message, None, *FORCED)
        for _ in range(n_updates):
            (before,) = await anext(answer)
        # No second answer begins meanwhile.
        second = session.on_submit({"text": "Hi", "files": []}, None, *PLAIN)
        ((refused,),) = [update async for update in second]
        assert refused["returned"][-1]["text"] == "Hi" and refused["is_busy"]
        if end == "close":  # the tab
            await answer.aclose()
            await asyncio.sleep(0.1)
            return before, session.chat.snapshot()
        (after,) = await (session.on_stop() if end == "stop" else session.on_undo())
        # The event itself sends its end, too.
        *_, (last,) = [update async for update in answer]
        assert last == after
        return before, after

    before, after = asyncio.run(ended())
    assert not after["is_busy"]
    is_answered = len(before["turns"]) == 2
    if end == "undo" or not is_answered:
        assert after["turns"] == [] and after["returned"][-1]["text"] == "Please draw a fish."
    else:
        assert after["turns"][1]["notes"][-1] == "Stopped."
        assert after["messages"][-1]["metadata"]["title"].endswith("Stopped.")
    n_turns = len(session.chat.turns)
    send(session, "Hello")
    assert len(session.chat.turns) == n_turns + 2


def test_an_answer_goes_on_in_a_chat_that_is_left(session):
    async def leave():
        answer = session.on_submit({"text": "One", "files": []}, None, *PLAIN)
        (first,) = await anext(answer)
        for number in range(20):  # looking through the list
            (*_, new) = await session.on_select({"id": f"{number}", "model": "", "turns": []})
        updates = [update async for update in answer]
        assert {update[0]["id"] for update in updates} == {new["id"]} == {"19"}
        return first, updates[-1][-1]

    first, last = asyncio.run(leave())
    assert first["id"] == last["id"] and len(last["turns"]) == 2 and not last["is_busy"]


def test_only_a_retry_is_sampled_at_temperature_0(session):
    question, answer = turns.Turn("user", ["One"]), turns.Turn("assistant", ["1."])
    temperatures = []
    for sent in ([question], [turns.Turn("user", ["Two"])], [question, answer, question]):
        session.chat.turns = [question, answer]
        session.chat.begin(sent)
        temperatures.append(session.chat.request(sent, *PLAIN)["temperature"])
        session.chat.stop()
    assert temperatures == [chat.RETRY_TEMPERATURE, 0, 0]


def test_an_earlier_answer_is_known_while_the_next_one_grows(session):
    send(session, "One")
    before = kept(session.chat.snapshot())
    session.chat.begin([*session.chat.turns, turns.Turn("user", ["Two"])])
    assert session.chat.turn_index(event(1), before) == 1
    session.chat.stop()
    with pytest.raises(RequestError, match="no longer"):
        session.chat.turn_index(event(1), before)


def test_a_chat_of_another_model_is_opened_beside_other_events(session, address):
    # The models are read meanwhile, and another conversation's event comes.
    session.models.append(session_of(address, "nano-x").model)
    session.models[1].name = "another"

    async def load_both():
        names = {"id": "7", "model": "another", "turns": []}, {"id": "8", "model": "another"}
        opened = asyncio.create_task(session.on_model(0, names[0]))
        await asyncio.sleep(0)
        await session.on_select({**names[1], "turns": []})
        return (await opened)[0][-1]

    opened = asyncio.run(load_both())
    assert opened["id"] == "7" and not opened["replaces"]


@pytest.mark.filterwarnings("ignore:")
def test_the_text_of_an_edit_that_has_no_answer_returns(session, address):
    *_, before = send(session, "One")
    for text, place in (("an <image>", "generate"), ("Two", "elsewhere")):
        session.model.address = address.replace("generate", place)
        *_, after = all_of(session.on_edit(event(0, value=text), None, *PLAIN))
        assert after["turns"] == before["turns"] and after["returned"][-1]["text"] == text
        assert after["revision"] > before["revision"], "the page shows the message as it was"


def test_events_of_two_conversations_reach_theirs(session):
    # An event that was overtaken by a click on another conversation is answered in its own.
    *_, first = send(session, "One")
    asyncio.run(session.on_select({"id": "2", "model": "", "turns": []}))
    *_, late = all_of(session.on_submit({"text": "Two", "files": []}, kept(first), *PLAIN))
    texts = [turn["parts"][0] for turn in late["turns"] if turn["role"] == "user"]
    assert (late["id"], texts) == (first["id"], ["One", "Two"])
    # An older copy of the browser is not read; of many conversations the oldest is forgotten.
    (same,) = asyncio.run(session.on_select(kept(first)))
    assert same["turns"] == late["turns"]
    for number in range(20):
        asyncio.run(session.on_select({"id": str(number), "model": "", "turns": []}))
    assert len(session.chats) == chat_session.MAX_CHATS


def test_uploads_stay_and_are_read_once(session, tmp_path, monkeypatch):
    # A visitor's files stay until the visit ends; Gradio's are its own.
    monkeypatch.setattr(chat_session, "MAX_UPLOADS", 2)
    files = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(files):
        noise(seed).save(path)
    fake = tmp_path / "fake.jpg"
    fake.write_bytes(b"no picture")
    message = {"text": "x", "files": [*map(str, files), str(fake)]}

    async def choose():
        # The browser asks several times at once, with the first image of a visit, too.
        results = await asyncio.gather(*[session.on_choose(message) for _ in range(3)])
        return [result["refused"] for result in results]

    with pytest.warns(UserWarning, match=r"fake\.jpg") as warnings:
        assert asyncio.run(choose()) == [[str(fake)]] * 3
    assert len(warnings) == 1 and "/" not in str(warnings[0].message)
    stored = [*session.path_of().glob("*.png")]
    assert len(stored) == 3
    send(session, "What is it?", str(files[2]))
    asyncio.run(session.on_select({"id": "2", "model": "", "turns": []}))
    assert all(path.is_file() for path in [*files, *stored])
    # Chosen again, it is refused again.
    asyncio.run(session.on_choose({"text": "x", "files": []}))
    with pytest.warns(UserWarning, match=r"fake\.jpg"):
        asyncio.run(session.on_choose(message))
    session.close()
    assert not session.path_of().exists() and all(path.is_file() for path in files)


def test_another_visitors_session_is_another_one(session, file):
    send(session, "What is it?", file)
    other = copy.deepcopy(session)
    assert other.chat.turns == [] and other.path_of() != session.path_of()


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
    return asyncio.run(session.on_model(0, {"id": "1", "model": "", "turns": [turn]}))


@pytest.mark.parametrize("part", [*PARTS.splitlines(), *LONG], ids=lambda part: part[:40])
def test_a_stored_conversation_that_is_not_the_pages_is_left_out(session, part):
    with pytest.warns(UserWarning, match="copy of the chat cannot be read: (turns.0.parts.0|it)"):
        _, title, *_ = reload_with(session, json.loads(part))
    assert session.chat.turns == [] and title["value"].startswith("<h1>SEED nano")


@pytest.mark.filterwarnings("ignore:")
def test_stored_images_that_cannot_be_drawn_are_not_shown(session):
    damaged = {"url": f"data:image/png;base64,{'A' * 30_000}"}
    updates = reload_with(session, {}, {"codes": [1]}, damaged, "Hi")
    returned = updates[0][-1]["returned"][-1]
    assert (returned["text"], returned["files"]) == ("Hi", [])


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
        *_, end = send(session, "Hi", *files)
        assert asyncio.run(session.on_codes(file)) == ("", [])
        assert asyncio.run(session.on_draw("a fox", 0, None)) == chat_session.NO_UPDATES
    assert (end["turns"], end["messages"], end["returned"][-1]["text"]) == ([], [], "Hi")
    assert len(end["returned"][-1]["files"]) == len(files)
    session.model.address = address
    send(session, "Hi")
    assert len(session.chat.turns) == 2


# ---- tabs and examples


def test_an_example_is_answered_and_offers_what_follows(session):
    # Examples without their images are not offered.
    for name, card in model_cards().items():
        assert chat.installed_examples(card) == [*card.examples] != [], name
    examples = chat.installed_examples(session.model.card)
    index = next(n for n, example in enumerate(examples) if example.images and example.then)
    *_, end = all_of(session.on_example(event(index), None, *PLAIN))
    assert len(end["turns"]) == 2
    assert len(end["turns"][0]["parts"]) == len(examples[index].images) + 1
    (option,) = end["messages"][-1]["options"]
    assert option["value"] == examples[index].then[0]
    *_, end = all_of(session.on_option(event(0, **option), None, *PLAIN))
    assert len(end["turns"]) == 4 and not end["messages"][-1]["options"]


# ---- the log of votes


def test_votes_and_answers_are_logged(session, file, tmp_path, caplog):
    session.log = chat_session.ConversationLog(tmp_path / "log")
    send(session, "What is it?", file)
    send(session, "And?")
    session.chat.turns[1].reasoning = "a dog: no"  # a message of its own
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
    assert len(session.chat.turns) == 6


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
    force, _, beams, _, temperature, _, rounds, shape, _, _, _, *tabs = updates[5:]
    names = ("draw", "edit", "codes", "find")
    shown = [name for name, update in zip(names, tabs, strict=True) if update["visible"]]
    assert shown == [*card.tabs] and shape["visible"] == ("lavit" in name)
    assert [temperature["value"], rounds["value"]] == [card.temperature, card.max_rounds]
    assert not force and beams["visible"] == ("lavit" not in name)
    assert not updates[4]["visible"], "what a model without known words can draw"


def test_known_panel_escapes_what_a_backend_names():
    panel = chat_session.known_panel({"<a>": ["x"], "things": ["dog", "<b>"]})
    assert "dog.webp" in panel and "<b>" not in panel and panel.index("dog") < panel.index("&lt;a")
