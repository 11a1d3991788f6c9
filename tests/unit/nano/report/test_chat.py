"""The measurement of answers in chat, on a tiny system of each kind."""

import pytest
from repository import NANO
from yaml_tables import read_tables

from seed_nano.report import requests
from seed_nano.report.chat import REQUESTS, main
from seed_nano.world.dialogues import DESCRIBE_REQUESTS
from seed_nano.world.records import record_at, texts_of
from seed_nano.world.typed import EVERYDAY
from seed_nano.world.words import parse_caption


@pytest.mark.parametrize(
    "fixture, talks",
    [("tiny_folder", True), ("tiny_lavit_folder", False)],
)
def test_chat_report_of_each_kind(fixture, talks, request, capsys):
    # The figures of the model card's table of requests.
    folder = request.getfixturevalue(fixture)
    assert main(f"--model {folder} --scenes 1 --device cpu".split()) == 0
    table = capsys.readouterr().out
    for text in REQUESTS:
        assert f"| {text} " in table
    assert "| all requests | 0.000 |" in table and f"| {len(REQUESTS)} |" in table
    assert ("| small talk |" in table) is talks


def test_requests_report_of_each_kind(request, monkeypatch, capsys):
    # A request of each category; LaVIT has neither earlier turns nor refusals.
    by_category = {row.category: row for row in requests.read_requests()}
    monkeypatch.setattr(requests, "read_requests", lambda _: list(by_category.values()))
    for fixture, talks in (("tiny_folder", True), ("tiny_lavit_folder", False)):
        folder = request.getfixturevalue(fixture)
        judge = NANO / "judge"
        assert requests.main(f"--model {folder} --judge {judge} --device cpu".split()) == 0
        table = capsys.readouterr().out
        assert "| bare nouns |" in table and "| all requests |" in table
        assert ("| no picture |" in table) is talks


def test_requests_are_in_no_training_record():
    # Else the tables would measure memory.
    rows = [*requests.read_requests(), *requests.read_requests(EVERYDAY)]
    asked = {row.asked.lower().rstrip(".!?") for row in rows}
    assert len(asked) >= 300 + 250
    for index in range(2000):
        kind = ("requests", "typed_draw", "typed_edits", "typed_questions")[index % 4]
        questions = record_at(kind, 1, index)["messages"][::2]
        assert asked.isdisjoint(text.lower().rstrip(".!?") for text in texts_of(questions))
    assert len(REQUESTS) == 12 and len(set(REQUESTS) - set(DESCRIBE_REQUESTS)) == 6


@pytest.mark.parametrize("row", read_tables(__file__), ids=str)
def test_is_shown(row):
    assert requests.is_shown(parse_caption(row["asked"]), row["shown"]) is row["is_right"]
