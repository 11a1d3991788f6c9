"""Figures of texts computed from the packed answers of the shipped systems equal their
report.json."""

import gzip
import json

import pytest
from repository import NANO, ROOT
from tiny import read_json

from seed_multimodal.evaluation.metrics import plain
from seed_nano.report.samples import Sizes, make_samples
from seed_nano.report.sections import Run, caption, qa
from seed_nano.report.systems import System


class Packed(System):
    """A system that returns its packed answers."""

    image_size = 64

    def __init__(self, answers: dict):
        self.answers = answers

    def encode(self, images) -> list:
        return list(images)

    def describe(self, encoded) -> list[str]:
        return [answer["text"] for answer in self.answers["captions"]]

    def ask(self, encoded, questions) -> list[str]:
        assert [answer["question"] for answer in self.answers["questions"]] == questions
        return [answer["answer"] for answer in self.answers["questions"]]


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_sections_of_packed_answers(name):
    from seed_nano.report.judge import Judge

    # The published figures follow from the published answers.
    folder = ROOT / "pretrained" / name / "report"
    shipped = read_json(folder / "report.json")
    answers = json.loads(gzip.decompress((folder / "answers.json.gz").read_bytes()))["val"]
    sizes = Sizes(**{key: shipped["settings"][key] for key in vars(Sizes())})
    judge = Judge.from_pretrained(NANO / "judge")
    run = Run(Packed(answers), judge, make_samples("val", sizes))
    for section in (caption, qa):
        figures = json.loads(json.dumps(plain(section(run))))
        assert figures == shipped["splits"]["val"][section.__name__]
    for packed in ("captions", "questions"):
        assert json.loads(json.dumps(run.answers[packed])) == answers[packed]
