"""The measurement of answers in chat, on a tiny system of each kind."""

from __future__ import annotations

import pytest

from seed_nano.world.dialogues import DESCRIBE_REQUESTS


@pytest.mark.parametrize(
    ("fixture", "talks"),
    [("tiny_folder", True), ("tiny_lavit_folder", False)],
)
def test_chat_report_of_each_kind(fixture, talks, request, capsys):
    from seed_nano.report.chat import REQUESTS, main

    # The figures of the model card's table of requests.
    folder = request.getfixturevalue(fixture)
    assert main(f"--model {folder} --scenes 1 --device cpu".split()) == 0
    table = capsys.readouterr().out
    for text in REQUESTS:
        assert f"| {text} " in table
    assert "| all requests | 0.000 |" in table and f"| {len(REQUESTS)} |" in table
    assert ("| small talk |" in table) is talks


def test_half_of_the_requests_are_in_no_training_record():
    from seed_nano.report.chat import REQUESTS

    # Else the table would measure memory.
    assert len(REQUESTS) == 12 and len(set(REQUESTS) - set(DESCRIBE_REQUESTS)) == 6
