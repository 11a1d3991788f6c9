"""Visits of the page as sequences of random actions: two visitors with two tabs each, whose
requests, updates, threads and file calls proceed in any order. After each action nothing that a
visitor typed or chose is lost, and the marked chat is the shown one; at rest the stored chats are
what a model of the page allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from visits import Visits, answer_to, code_of, drawing, open_browser, tokens

from seed_multimodal.images.io import decode_text

pytestmark = [pytest.mark.browser, pytest.mark.process, pytest.mark.slow]
TABS = st.sampled_from(("a1", "a1", "a1", "a2", "b1", "b1", "b2"))
INDICES = st.integers(0, 3)
PICTURES = st.integers(1, 3)
STEPS = st.lists(st.integers(0, 5), max_size=12)
KINDS = st.sampled_from(("", "draw", "fail"))
MOST_EVENTS = 4  # of a chat since the last rest, in any order

Words = frozenset[str]  # what a visitor typed ("w1") and chose ("p1")


# ---- the model: a chat, and what an event makes of it


class Chat(NamedTuple):
    """turns: (words, answer), which is "whole", "part" or "". before: while it is answered."""

    turns: tuple[tuple[Words, str], ...] = ()
    before: tuple[tuple[Words, str], ...] | None = None


def ends(chat: Chat, is_reloaded: bool) -> Iterator[Chat]:
    """What a chat may be when its next event comes. is_reloaded: its tab, which ends the answer."""
    yield chat
    if chat.before is None:
        if chat.turns and not chat.turns[-1][1]:
            yield Chat(chat.turns[:-1])  # an unanswered message returned to the box
        return
    *earlier, (words, _) = chat.turns
    if any("fail" in word for word in words):
        yield Chat(chat.before)
    else:
        yield Chat((*earlier, (words, "whole")))
    if is_reloaded:
        yield from stopped(chat)
        if len(chat.turns) > len(chat.before):
            yield Chat((*earlier, (words, "")))


def stopped(chat: Chat) -> Iterator[Chat]:
    *earlier, (words, _) = chat.turns
    yield Chat((*earlier, (words, "part")))
    yield Chat(chat.before or ())


def after(
    chat: Chat, event: str, words: Words = frozenset(), index: int = 0, *, is_alone: bool
) -> Iterator[Chat]:
    """is_alone: no other event changes the chat before its tab shows it."""
    turns = chat.turns
    if event in ("undo", "retry", "edit") and not is_alone:
        yield chat  # the tab has shown another state
    match event:
        case "stop" if chat.before is not None:
            yield from stopped(chat)
        case "undo":
            yield Chat(turns[:-1])
        case "submit" if chat.before is None and words:
            yield Chat((*turns, (words, "")), turns)
        case "retry" if chat.before is None and turns:
            yield Chat((*turns[:-1], (turns[-1][0], "")), turns)
        case "edit" if chat.before is None and index < len(turns):
            pictures = {word for word in turns[index][0] if word[0] == "p"}
            yield Chat((*turns[:index], (words | pictures, "")), turns)
        case _:  # refused
            yield chat


def allowed(chat: Chat, events: list[tuple[Any, ...]], is_reloaded: bool) -> set[Chat]:
    """What a chat may be at rest, of events in any order."""
    results = set()
    for ordered in itertools.permutations(events):
        chats = {chat}
        for event in ordered:
            now = {end for chat in chats for end in ends(chat, is_reloaded)}
            chats = {
                end
                for chat in now
                for end in after(chat, *event, is_alone=len(events) == 1 and not is_reloaded)
            }
        results |= {end for chat in chats for end in ends(chat, is_reloaded)}
    return {answered(chat) for chat in results if chat.before is None}


def answered(chat: Chat) -> Chat:
    """Without messages that returned to the box of a chat that was left, which are its last one."""
    return Chat(chat.turns[:-1] if chat.turns and not chat.turns[-1][1] else chat.turns)


# ---- what the browser has


def files_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [value["path"]] if "path" in value else files_in([*value.values()])
    return [file for item in value for file in files_in(item)] if isinstance(value, list) else []


def box_words(box: Any) -> Words:
    files = [file for file in files_in(box) if not file.endswith(".heic")]
    return tokens(box["text"]) | {f"p{code_of(file)}" for file in files}


def shown_texts(chat: list[Any]) -> list[str]:
    """The user's texts."""
    return [
        "".join(part.get("text", "") for part in message["content"]).rstrip("\u200b")
        for message in chat
        if message["role"] == "user"
    ]


def picture_code(stored: Any) -> int:
    if "codes" in stored:
        return stored["codes"][0]
    return code_of(decode_text(stored["url"].partition(",")[2]))


def title_of(stored: Any) -> str:
    if "name" in stored:
        return stored["name"]
    parts = itertools.chain(*(turn["parts"] for turn in stored["turns"]))
    texts = (part.strip() for part in parts if isinstance(part, str))
    return next(filter(None, texts), "Images")


def stored_chat(stored: Any) -> Chat:
    """A stored chat, of which each answer is that of its message, or a part and says so."""
    turns: list[tuple[Words, str]] = []
    for turn in stored["turns"] if stored else []:
        text = "".join(part for part in turn["parts"] if isinstance(part, str))
        codes = [picture_code(part) for part in turn["parts"] if isinstance(part, dict)]
        if turn["role"] == "user":
            turns.append((tokens(text) | {f"p{code}" for code in codes}, ""))
            expected = answer_to(text, codes)
        elif turn["notes"] == ["Stopped."]:
            assert expected.startswith(text), turn
            turns[-1] = (turns[-1][0], "part")
        else:
            assert text == expected and not turn["notes"], turn
            turns[-1] = (turns[-1][0], "whole")
    assert all(answer for _, answer in turns[:-1]), turns
    return Chat(tuple(turns))


# ---- the machine


class Machine(RuleBasedStateMachine):
    browser: Any = None
    folder: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.visits = Visits(self.browser, self.folder)
        self.count = 0
        self.given: dict[str, set[str]] = {"a": set(), "b": set()}
        self.excused: dict[str, set[str]] = {"a": set(), "b": set()}  # the visitor took them away
        self.sent: list[tuple[str, str, Words]] = []  # tab, chat and words
        self.closed: list[Any] = []
        self.uploads: dict[str, int] = {}
        # Of the model, by the chat's key: tabs that opened it, events since the last rest.
        self.keys: dict[str, set[str]] = {}  # of an ID; several: other tabs changed the chat
        self.users: dict[str, set[str]] = {}
        self.events: dict[str, list[tuple[Any, ...]]] = {}
        self.reloaded: set[str] = set()  # tabs, since the last rest
        self.chats: dict[str, Chat] = {}
        self.is_right = True
        self.notice()

    @property
    def states(self) -> Any:
        return self.visits.browser("states")

    def notice(self) -> None:
        for name, state in self.states.items():
            keys = self.keys.setdefault(state["id"], set())
            keys.add(state["key"])
            for key in keys:
                self.users.setdefault(key, set()).add(name if len(keys) == 1 else "another tab")

    def act(self, tab: str, action: str, argument: Any = None) -> None:
        """An action, whose events are those of the open chat."""
        requests = self.visits.act(tab, action, argument)
        self.notice()
        for index, (event, sent, message) in enumerate(requests):
            if event not in ("submit", "stop", "undo", "retry"):
                continue
            key, *_ = self.keys[sent["id"]]
            if event == "submit" and message:
                words = box_words(message)
                is_bad = "bad.heic" in str(message)
                self.sent.append((tab, sent["id"], words))
                self.events.setdefault(key, []).append(
                    (event, words | {"fail"} if is_bad else words)
                )
            elif event != "submit" and index == 0:  # not the second click of a double one
                self.events.setdefault(key, []).append((event,))

    def excuse(self, state: Any, tab: str, *keys: str) -> None:
        """What the visitor takes away with a chat."""
        for key in keys:
            turns = stored_chat(state["chats"].get(key)).turns
            words = [words for _, id, words in self.sent if key in self.keys[id]]
            self.excused[tab[0]] |= {*itertools.chain(*words, *(words for words, _ in turns))}

    def upload(self, picture: int) -> str:
        path = self.visits.upload(drawing(picture), f"p{picture}.png")
        self.uploads[path] = Path(path).stat().st_mtime_ns
        return path

    # ---- actions

    @rule(tab=TABS, kind=KINDS)
    def type(self, tab, kind):
        self.count += 1
        self.given[tab[0]].add(f"w{self.count}{kind}")
        self.act(tab, "type", f"w{self.count}{kind}")

    @rule(tab=TABS, picture=PICTURES | st.none())
    def choose(self, tab, picture):
        if picture:
            self.given[tab[0]].add(f"p{picture}")
            self.act(tab, "attach", self.upload(picture))
        else:
            self.act(tab, "attach", self.visits.upload("", "bad.heic"))

    @rule(tab=TABS)
    def send(self, tab):
        self.act(tab, "send")

    @rule(tab=TABS, kind=KINDS, picture=PICTURES | st.none(), indices=STEPS)
    def ask(self, tab, kind, picture, indices):
        self.type(tab, kind)
        if picture:
            self.choose(tab, picture)
        self.send(tab)
        self.step(indices)

    @rule(
        tab=TABS,
        event=st.sampled_from(("stop", "undo", "retry")),
        n_clicks=st.integers(1, 2),
        indices=STEPS,
    )
    def press(self, tab, event, n_clicks=1, indices=()):
        if event == "stop" or shown_texts(self.states[tab]["chat"]):
            self.act(tab, "events", [event] * n_clicks)
            self.step(indices)

    @rule(tab=TABS)
    def new(self, tab):
        self.act(tab, "new")

    @rule(tab=TABS, index=INDICES)
    def open(self, tab, index):
        if n := self.states[tab]["n"]:
            self.act(tab, "open", index % n)

    @rule(tab=TABS, index=INDICES, item=st.sampled_from(("Pin", "Unpin", "Rename")))
    def describe(self, tab, index, item):
        if n := self.states[tab]["n"]:
            self.act(tab, "choose_in_menu", [index % n, item])

    @rule(tab=TABS, index=INDICES)
    def delete(self, tab, index):
        before = self.states
        if n := before[tab]["n"]:
            self.act(tab, "choose_in_menu", [index % n, "Delete"])
            (key,) = before[tab]["chats"].keys() - self.states[tab]["chats"]
            self.users.setdefault(key, set()).add(f"deleted in {tab}")
            self.excuse(before[tab], tab, key)

    @rule(tab=TABS, is_closed=st.booleans())
    def reload(self, tab, is_closed):
        # The box is lost, and a message that the browser has sent and that no update names yet.
        state = self.states[tab]
        turns = [turn for chat in state["chats"].values() for turn in stored_chat(chat).turns]
        stored = {*itertools.chain(*(words for words, _ in turns))}
        sent = {*itertools.chain(*(words for name, _, words in self.sent if name == tab))}
        self.excused[tab[0]] |= box_words(state["box"]) | (sent - stored)
        if is_closed:
            self.closed.append(self.visits.tabs[tab].session)
        self.reloaded.add(tab)
        self.visits.load(tab)

    @rule(tab=TABS, index=INDICES)
    def edit(self, tab, index):
        state = self.states[tab]
        shown = [n for n, message in enumerate(state["chat"]) if message["role"] == "user"]
        if shown:
            self.count += 1
            self.given[tab[0]].add(f"w{self.count}")
            turn = index % len(shown)
            self.excuse(state, tab, state["key"])
            self.excused[tab[0]] |= tokens(" ".join(shown_texts(state["chat"])))
            words = Words({f"w{self.count}"})
            self.sent.append((tab, state["id"], words))
            event = ("edit", words, turn)
            self.events.setdefault(state["key"], []).append(event)
            self.act(tab, "edit", {"index": shown[turn], "value": f"w{self.count}"})

    @rule(tab=TABS, picture=PICTURES)
    def edit_image(self, tab, picture):
        self.visits.change_image(tab, self.upload(picture))

    @rule(indices=STEPS)
    def step(self, indices):
        for index in indices:
            self.visits.steps.step(index)

    @rule(order=INDICES)
    def rest(self, order=0):
        self.visits.steps.rest(order)
        self.check_at_rest()
        for session in self.closed:  # as Gradio does it some time later
            session.close()

    # ---- what holds

    @invariant()
    def check(self):
        self.is_right = False
        assert self.visits.errors == []
        for path, time in self.uploads.items():
            assert Path(path).stat().st_mtime_ns == time, "an upload changed"
        for name, state in self.states.items():
            for file in files_in([state["box"], state["chat"]]) + self.visits.tabs[name].gallery:
                assert Path(file).is_file(), f"{name} names a file that is gone"
            stored = state["chats"].get(state["key"])
            is_deleted = "deleted" in str(self.users.get(state["key"]))  # in another tab
            n_marked = len(state["marked"])
            assert is_deleted or n_marked == (stored is not None), "not one chat is marked"
            others = {title_of(chat) for key, chat in state["chats"].items() if key != state["key"]}
            own = {"Images", title_of(stored)} if stored else set()
            assert not others & {*state["marked"]} - own, "another chat is marked"
            assert state["id"], "events name no chat"
        self.is_right = True

    def check_at_rest(self):
        self.is_right = False
        found: dict[str, set[str]] = {"a": set(), "b": set()}
        for name, state in self.states.items():
            chats = {key: stored_chat(stored) for key, stored in state["chats"].items()}
            turns = [turn for chat in chats.values() for turn in chat.turns]
            found[name[0]] |= box_words(state["box"]).union(*(words for words, _ in turns))
            assert "bad.heic" not in str(state["box"]), "a refused file stays"
            for key, tabs in self.users.items():
                if tabs == {name}:
                    self.check_chat(name, state, key, chats.get(key, Chat()))
                is_deleted = tabs == {name, f"deleted in {name}"}
                assert not (is_deleted and key in chats), "a deleted chat is back"
        for visitor in "ab":
            lost = self.given[visitor] - self.excused[visitor] - found[visitor]
            assert not lost, f"{visitor} lost {lost}"
        self.events.clear()
        self.reloaded.clear()
        self.notice()
        self.is_right = True

    def check_chat(self, tab: str, state: Any, key: str, chat: Chat) -> None:
        """A chat of one tab is one that the model allows, and is shown as it is stored."""
        events = self.events.get(key, [])
        is_edit_alone = len(events) == 1 or not any(event[0] == "edit" for event in events)
        if len(events) <= MOST_EVENTS and is_edit_alone:
            expected = allowed(self.chats.get(key, Chat()), events, tab in self.reloaded)
            assert answered(chat) in expected, (chat, expected, self.chats.get(key), events)
        self.chats[key] = chat
        if key == state["key"]:
            shown = [tokens(text) for text in shown_texts(state["chat"])]
            typed = [{word for word in words if word[0] == "w"} for words, _ in chat.turns]
            assert shown == typed, "another chat is shown"

    def teardown(self):
        try:
            if self.is_right:
                self.rest(1)  # the oldest comes last
                self.check()
        finally:
            self.visits.close()


# ---- the tests


@pytest.fixture(scope="module")
def browser():
    with open_browser(Path(__file__).with_name("visits.js")) as browser:
        yield browser


@pytest.fixture
def machine(browser, tmp_path, monkeypatch):
    """The class, with a browser and a folder of this test."""
    folder = tmp_path / "visits_of_test"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))
    monkeypatch.setattr(Machine, "browser", browser)
    monkeypatch.setattr(Machine, "folder", folder)
    return Machine


def ask(machine, kind="", picture=None, indices=(), tab="a1"):
    machine.ask(kind=kind, picture=picture, indices=indices, tab=tab)


def is_back_once(machine):
    texts = machine.states["a1"]["box"]["text"].split()
    assert texts == [*dict.fromkeys(texts)], "a message returned twice"


def answered_visit(machine):
    """A visit with one answered message, and its snapshot."""
    visit = machine()
    ask(visit)
    visit.rest()
    return visit, visit.visits.tabs["a1"].session.chat.snapshot()


def share(machine):
    """Both tabs of a visitor show his chat."""
    ask(machine)
    machine.rest()
    machine.open(tab="a2", index=0)
    machine.rest()


SEQUENCES = {
    "two sends": lambda visit: (ask(visit), ask(visit)),
    "a failure while leaving": lambda visit: (
        ask(visit, "fail", None, [0] * 6),
        visit.new(tab="a1"),
    ),
    "leaving a picture beside a file that is none": lambda visit: (
        visit.choose(tab="a1", picture=None),
        ask(visit, "", 1),
        visit.new(tab="a1"),
    ),
    "three sends, of which no one is answered": lambda visit: (
        ask(visit, "fail", None, [0] * 3),
        ask(visit, "", None, [0, 0]),
        ask(visit),
    ),
    "leaving an unread picture": lambda visit: (ask(visit, "", 1), visit.new(tab="a1")),
    "a late update of Stop": lambda visit: (
        ask(visit),
        visit.rest(),
        visit.press(tab="a1", event="stop", indices=[0]),
        ask(visit),
        visit.rest(1),
    ),
    "a chat that two tabs continue": lambda visit: (
        share(visit),
        ask(visit),
        visit.rest(),
        ask(visit, tab="a2"),
        visit.rest(),
        visit.open(tab="a2", index=1),
        visit.rest(),
        ask(visit, tab="a2"),
    ),
    "a name from another tab": lambda visit: (
        share(visit),
        visit.describe(tab="a2", index=0, item="Rename"),
        ask(visit),
        visit.rest(),
        visit.describe(tab="a2", index=0, item="Pin"),
    ),
    "undo in a tab while another opens the chat": lambda visit: (
        ask(visit),
        visit.rest(),
        visit.open(tab="a2", index=0),
        visit.press(tab="a1", event="undo", indices=[0, 0, 1, 0]),
    ),
    "back to a chat that failed and was forgotten": lambda visit: (
        ask(visit, "fail", None, [0] * 3),
        *((visit.new(tab="a1"), visit.rest()) for _ in range(9)),
        visit.open(tab="a1", index=0),
        visit.rest(),
        is_back_once(visit),
    ),
    "a chat that is deleted in one tab and continued in both": lambda visit: (
        share(visit),
        visit.delete(tab="a1", index=0),
        ask(visit, tab="a2"),
        visit.rest(),
        visit.open(tab="a1", index=0),
        ask(visit),
        visit.rest(),
        visit.reload(tab="a1", is_closed=False),
    ),
    "an answer beside a chat that another tab continues": lambda visit: (
        ask(visit, "draw", None, [0] * 12),
        visit.new(tab="a1"),
        visit.step([0] * 4),
        ask(visit, "", None, [0] * 30),
        visit.open(tab="a2", index=0),
        visit.rest(),
        ask(visit, tab="a2"),
    ),
    "the second click of Undo": lambda visit: (
        ask(visit),
        visit.rest(),
        ask(visit),
        visit.rest(),
        visit.press(tab="a1", event="undo", n_clicks=2),
    ),
    "back to a chat that is answered": lambda visit: (
        ask(visit, "draw", None, [0] * 12),
        visit.new(tab="a1"),
        visit.step([0] * 8),
        visit.open(tab="a1", index=0),
    ),
    "deleting a chat that is answered": lambda visit: (
        ask(visit, "draw", None, [0] * 8),
        visit.new(tab="a1"),
        visit.delete(tab="a1", index=0),
    ),
}


N_CHATS = {
    "a chat that two tabs continue": 2,
    "a name from another tab": 1,
    "a chat that is deleted in one tab and continued in both": 1,
    "an answer beside a chat that another tab continues": 2,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("is_loaded", [True, False])
def test_nothing_is_lost_by(machine, name, is_loaded):
    visit = machine()
    if is_loaded:
        visit.rest()
    try:
        SEQUENCES[name](visit)
        n_chats = len(visit.states["a1"]["chats"])
        assert n_chats == N_CHATS.get(name, n_chats)
    finally:
        visit.teardown()


@pytest.mark.filterwarnings("ignore")
def test_the_last_of_two_equal_updates_is_shown(machine):
    # Gradio's differences between lists may be wrong; the last update of an event is whole.
    visit, snapshot = answered_visit(machine)
    for messages in ([], snapshot["messages"]):
        visit.act("a1", "update", [{**snapshot, "messages": messages}])
        assert visit.states["a1"]["chat"] == messages
    visit.teardown()


@pytest.mark.filterwarnings("ignore")
def test_a_chat_takes_the_place_of_the_open_one_once(machine):
    visit, snapshot = answered_visit(machine)
    key = snapshot["id"]
    new = {**snapshot, "id": "new", "replaces": key}  # of a model that is chosen
    shown = []
    for update in ([new], [snapshot], [{**new, "revision": new["revision"] + 1}]):
        visit.act("a1", "update", update)
        shown.append(visit.states["a1"]["id"])
        if shown == ["new"]:
            visit.act("a1", "open", 1)
    assert shown == ["new", key, key]
    visit.visits.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("n", [50, pytest.param(2000, marks=pytest.mark.nightly)])
def test_nothing_is_lost_in_random_visits(machine, n):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=n,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # shorter sequences are found in minutes only
        ),
    )
