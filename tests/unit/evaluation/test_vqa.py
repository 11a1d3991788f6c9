"""VQA accuracy by the official rules and by LaVIT's."""

from collections import Counter
from pathlib import Path

import pytest
from yaml_tables import read_tables

from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.vqa import (
    ANSWERABLE,
    PLAIN_QUESTION,
    UNANSWERABLE,
    Questions,
    accuracies,
    vqa_accuracy,
    vqa_answer,
)
from seed_multimodal.recipes.lavit.evaluate import lavit_answer

TABLES = read_tables(__file__)


@pytest.mark.parametrize("text, normalised", TABLES["official"].items())
def test_vqa_answer_follows_the_official_rules(text, normalised):
    # Scores are compared with published ones, to which each of these rules belongs.
    assert vqa_answer(text) == normalised


@pytest.mark.parametrize("text, normalised", TABLES["lavit"].items())
def test_lavit_answer_removes_opening_words(text, normalised):
    # LaVIT's own program: its published scores of VizWiz need it.
    assert lavit_answer(text) == normalised


@pytest.mark.parametrize("case", TABLES["accuracies"], ids=str)
def test_vqa_accuracy_is_the_mean_over_the_other_annotators(case):
    references = list(Counter(case["references"]).elements())
    accuracy = vqa_accuracy(case["answer"], references, official="own" not in case)
    assert accuracy == pytest.approx(case["accuracy"])


def test_accuracies_count_an_unanswered_question_as_wrong():
    samples = [Sample(0, "", answer_type="a"), Sample(1, "", answer_type="b")]
    scores = accuracies(samples, [{"answer": "x"}, {"bad": "no image"}], lambda *_: 0.5)
    assert scores == {
        "accuracy": 25.0,
        "per_answer_type": {"a": 50.0, "b": 0.0},
        "per_question_type": {},
    }


class Asked:
    """A system with fixed answers, which keeps the questions."""

    def __init__(self, *rounds: list[str]) -> None:
        self.rounds = iter(rounds)
        self.questions: list[list[str]] = []

    def ask(self, images, questions, **options) -> list[str]:
        self.questions.append(questions)
        return next(self.rounds)


def questions(dataset: str, *rounds: list[str], **settings) -> Questions:
    benchmark = Questions(out=Path("out"), file="q.json", dataset=dataset, **settings)
    benchmark.use(Asked(*rounds))
    return benchmark


def test_answer_asks_vizwiz_first_whether_there_is_an_answer():
    # Published figures of VizWiz need both questions; "nobody" is no "no".
    samples = [Sample(n, "", question=f"q{n}") for n in range(3)]
    benchmark = questions("vizwiz", ["No.", "yes", "nobody"], ["a fox.", "x."])
    lines = benchmark.answer(samples, [None] * 3)
    assert [line["answer"] for line in lines] == [UNANSWERABLE, "a fox", "x"]
    first, second = benchmark.system.questions
    assert first[1] == ANSWERABLE.format("q1") and second == ["q1", "q2"]
    # Other sets are asked once; the pretrained model has its own form, and goes on asking.
    plain = questions("okvqa", ["a fox\nQuestion: what"], prompts="plain")
    assert plain.answer(samples[:1], [None]) == [{"answer": "a fox"}]
    assert plain.system.questions == [[PLAIN_QUESTION.format("q0")]]


@pytest.mark.parametrize("dataset", TABLES["results"])
def test_score_writes_the_results_of_each_server(dataset):
    expected = TABLES["results"][dataset]
    samples = [Sample(1, "", "a.jpg", references=["red", "blue"])]
    scores = questions(dataset).score(samples, [{"answer": "red"}])
    assert scores.results == [expected["result"]]
    assert scores.values["accuracy"] == expected["accuracy"]
    # VizWiz's server names questions by their images; a test set has no accuracy.
    [named] = questions(dataset).score([Sample("v.jpg", "", "v.jpg")], [{}]).results
    assert (named["question_id"], named["answer"]) == ("v.jpg", "")
    assert ("image" in named) == (dataset != "gqa")
    unscored = questions(dataset).score([Sample(1, "")], [{}])
    assert unscored.values == {} and "no accuracy" in unscored.notes[0]
