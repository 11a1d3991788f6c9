"""Tasks and their events: what is cut, drawn together, refused, and said before an answer."""

from pathlib import Path

import pytest
from repository import ROOT
from systems import load
from yaml_tables import read_tables

from seed_multimodal.errors import ConfigError

FOX = ROOT / "images/fox_and_snowman.png"


@pytest.fixture(scope="module")
def nano():
    return load("nano")


def user(*content):
    return {"role": "user", "content": [*content]}


@pytest.mark.parametrize("n_rounds", [0, 1, 10, 60, 700])
def test_conversations_are_cut_by_few_prompts(nano, n_rounds, monkeypatch):
    # As many rounds stay as fit, whatever is in front of them.
    rounds = [user(f"hi {index}") for index in range(n_rounds) for _ in "ab"]
    for message in rounds[1::2]:
        message |= {"role": "assistant", "content": "a fox"}
    built = []
    prompts = nano.family.prompts
    monkeypatch.setattr(nano.family, "prompts", lambda *a: built.append(prompts(*a)) or built[-1])
    answer = nano.chat([*rounds, user("What is this?")], max_new_tokens=20)
    assert len(built) <= 12
    length = answer.prompt_tokens
    n_left_out = int(answer.note.split()[2]) if "left out" in answer.note else 0
    assert length + 20 <= nano.engine.capacity
    kept = [*rounds, user("What is this?")][n_left_out:]
    assert nano.chat(kept, max_new_tokens=20).ids == answer.ids
    if n_left_out:
        longer = nano.chat([*rounds[n_left_out - 2 :], user("What is this?")], max_new_tokens=20)
        assert longer.prompt_tokens == length  # the round before does not fit


def test_images_of_a_stream_are_drawn_together(nano, monkeypatch):
    calls = []
    draw = nano.images.draw

    def counted(rows, **options):
        calls.append(len(rows))
        return draw(rows, **options)

    monkeypatch.setattr(nano.images, "draw", counted)
    options = {"num_images": 3, "read_back": False, "previews": [8, 16]}
    events = list(nano.draw("a noto fox", stream=True, **options))
    assert calls == [3, 3, 3]
    kinds = [(event["type"], event["index"], len(event["codes"])) for event in events]
    previews = [("image_preview", index, length) for length in (8, 16) for index in range(3)]
    assert kinds == [*previews, *(("image", index, 32) for index in range(3))]


REQUESTS = {
    "describe": [FOX],
    "ask": [FOX, "Where?"],
    "draw": ["a fox"],
    "chat": [[user("Please draw a noto fox in a meadow.")]],
}


@pytest.mark.parametrize("row", read_tables(__file__), ids=str)
def test_options_that_a_task_does_not_read_are_refused(nano, row):
    task = row["task"]
    options = row["options"]
    with pytest.raises(ConfigError, match=[*options][-1]):
        getattr(nano, task)(*REQUESTS[task], **options)


def test_what_is_compared_first_is_reasoning(nano):
    question = user(Path(FOX), "Where is the snowman?")
    answer = nano.chat([question])
    assert (answer.reasoning[-3:], answer.text) == ("yes", "On the right.")
    *events, done = nano.chat([question], stream=True)
    assert [event["type"] for event in events[:2]] == ["reasoning", "text"]
    assert "".join(event["text"] for event in events[1:]) == answer.text
    assert done["answer"] == answer
    again = [question, {"role": "assistant", "content": answer}, user("Is it a snowman?")]
    assert nano.chat(again).prompt_tokens > len(answer.ids)
