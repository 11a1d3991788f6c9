"""What evaluations do to each question or picture of a set of any length: answer, describe; and how that is scored.

    work, score = question_work(asked, Questions("v2_OpenEnded_….json"), annotations)
    run_through(work, score, folder, batch=32)

Each function gives the `Work` of `answer_folder` and the `Score` of its lines: results in the benchmark's own format,
and numbers. Drawing: `drawing_work`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from seed_multimodal.data.formats.benchmark_files import (
    Annotation,
    Annotations,
    GqaItems,
    Question,
    Questions,
    names_vizwiz,
)
from seed_multimodal.data.formats.caption_files import CaptionedPicture
from seed_multimodal.data.formats.pictures import HeldPicture
from seed_multimodal.disk import sha256_of
from seed_multimodal.errors import counted
from seed_multimodal.evaluation.answer_folder import Line, Score, Work
from seed_multimodal.evaluation.asking import Asked
from seed_multimodal.evaluation.java_scores import java_scores
from seed_multimodal.evaluation.vqa_accuracy import UNANSWERABLE, lavit_answer, vqa_accuracy, vqa_answer
from seed_multimodal.language.caption_scores import caption_scores

ANSWERABLE = 'Is the question: "{}" answerable?'  # LaVIT's evaluation on VizWiz asks this first
FULL = 4  # so many annotators, if they agree, make an answer wholly right: three of the others
NO_LEMMAS = ("Answers and annotations were compared as they stand, not by their dictionary forms, because spaCy or its "
             "model en_core_web_sm is not there; accuracies can be lower by a little.")
ONE_PICTURE = ("CIDEr of a single picture is 0, whatever its caption: words are weighed by how few of the pictures "
               "have them.")
T = TypeVar("T")
Lemmas = Callable[[str], str]


@dataclass(frozen=True)
class QuestionRules:
    """How a set's questions are asked, and its answers compared.

    Attributes:
        lavit: LaVIT's rule for answers instead of the official one, see `vqa_accuracy`.
        exact: an answer is right if it equals the right one (GQA), instead of agreement with ten annotators.
        answerable: it is asked first whether the question can be answered (VizWiz).
        lemmas: what makes dictionary forms of the annotators' words, as LaVIT's answers have them; None: they stay.
        legacy: as LaVIT's evaluation was released: see `lavit_answer`; and every "no" in the answer to that first
            question counts, that of "not known" and of "nothing", too.
    """

    lavit: bool = False
    exact: bool = False
    answerable: bool = False
    lemmas: Lemmas | None = None
    legacy: bool = False

    def refuses(self, said: str) -> bool:
        """Whether this answer to `ANSWERABLE` is a no."""
        return "no" in said if self.legacy else re.search(r"\bno\b", said.lower()) is not None

    def accuracy(self, answer: str, truth: Annotation) -> float:
        """0 to 1."""
        rule = partial(lavit_answer, legacy=self.legacy) if self.lavit else vqa_answer
        wanted = truth.answers if self.lemmas is None else [self.lemmas(one) for one in truth.answers]
        return float(rule(answer) == wanted[0]) if self.exact else vqa_accuracy(answer, wanted, rule)


@dataclass
class PictureSamples(Generic[T]):
    """Items with pictures by number; neighbours with one picture (as in VQA) have it decoded once."""

    keys: Sequence[int | str]
    item: Callable[[int], T]
    see: Callable[[T], Any]
    picture: Callable[[T], int | str | HeldPicture]
    _last: tuple[int | str | HeldPicture | None, Any] = (None, None)

    def read(self, number: int) -> tuple[T, Any]:
        """The item and its picture as the system takes it. Raises as `answer_folder.Samples`."""
        item = self.item(number)
        name, seen = self._last
        if seen is None or name != self.picture(item):
            seen = self.see(item)
            self._last = (self.picture(item), seen)
        return item, seen


def question_work(asked: Asked, questions: Questions, annotations: Annotations | None, limit: int | None = None,
                  rules: QuestionRules = QuestionRules()) -> tuple[Work[tuple[Question, Any]], Score]:  # noqa: B008
    """Answers to a file of questions; results as the official server takes them, accuracy in percent if annotated.

    A question without an answer counts as wrong; an item that is no question does not count.
    """
    path = questions.items.path

    def answer(block: list[tuple[Question, Any]]) -> list[Line]:
        lines: list[Line] = [{} for _ in block]
        if rules.answerable:
            doubts = asked.ask([seen for _, seen in block], [one.text for one, _ in block], ANSWERABLE)
            lines = [{"answerable": text, **({"answer": UNANSWERABLE} if rules.refuses(text) else {})}
                     for text in doubts]
        left = [row for row, line in enumerate(lines) if "answer" not in line]
        said = asked.ask([block[row][1] for row in left], [block[row][0].text for row in left]) if left else []
        for row, text in zip(left, said, strict=True):
            lines[row]["answer"] = text.removesuffix(".")  # tuned models end answers in a full stop
        return lines

    def results(lines: Sequence[Line]) -> Any:
        return [_result(line, isinstance(questions.items, GqaItems)) for line in lines
                if line["id"] not in questions.problems]

    def numbers(lines: Sequence[Line]) -> dict[str, Any]:
        if annotations is None:
            return {}
        asked_for = [line for line in lines if line["id"] not in questions.problems]
        if not asked_for:
            return {}  # 0 would be a number
        plain = rules.lemmas is not None and not getattr(rules.lemmas, "uses_spacy", True)
        notes = [*([NO_LEMMAS] if plain else []), *unreachable([line["id"] for line in asked_for], annotations, rules)]
        found = _accuracies(asked_for, annotations, rules)
        return {**found, "notes": notes} if notes else found

    samples = PictureSamples(questions.keys, questions.read, lambda one: asked.see(one.picture, path, one.name),
                             lambda one: one.picture)
    settings = {"task": "vqa", "questions": file_identity(path), **asked.facts(), **(
        {"answerable": True, "legacy": rules.legacy} if rules.answerable else {})}
    return Work(samples, answer, settings, limit), Score(results, numbers)


def _result(line: Line, gqa: bool) -> Line:
    """An answer as VQA's server takes it, with the names that GQA's program or VizWiz's server reads beside its own."""
    key, answer = line["id"], line.get("answer", "")
    more = {"questionId": key, "prediction": answer} if gqa else {"image": key} if names_vizwiz(key) else {}
    return {"question_id": key, "answer": answer, **more}


def _accuracies(lines: Sequence[Line], annotations: Annotations, rules: QuestionRules) -> dict[str, Any]:
    """In percent: of all, by type of answer and by type of question."""
    sums: dict[str, dict[str, list[float]]] = {"per_answer_type": {}, "per_question_type": {}}
    total = 0.0
    for line in lines:
        truth = annotations.read(line["id"])
        value = 100 * rules.accuracy(line["answer"], truth) if "answer" in line else 0.0
        total += value
        for name, kind in (("per_answer_type", truth.answer_type), ("per_question_type", truth.question_type)):
            sums[name].setdefault(kind, []).append(value)
    means = {name: {kind: round(sum(values) / len(values), 2) for kind, values in kinds.items() if kind}
             for name, kinds in sums.items()}
    return {"accuracy": round(total / max(1, len(lines)), 2), **means}


def unreachable(keys: Sequence[int | str], annotations: Annotations, rules: QuestionRules) -> list[str]:
    """A sentence on the questions that even the annotators' own answers get wrong."""
    lost, few = list[int | str](), list[int | str]()
    if rules.lemmas is not None:
        rules = replace(rules, lemmas=str.lower)  # enough to know, and quick
    for key in keys:
        truth = annotations.read(key)
        if not rules.exact and len(truth.answers) < FULL:
            few.append(key)
        elif not any(rules.accuracy(one, truth) for one in truth.answers):
            lost.append(key)
    notes = []
    if few:
        notes.append(f"{counted(len(few), 'question')} of {len(keys):,} (first {few[0]}) have fewer than {FULL} "
                     "annotated answers, of which accuracy is by agreement with three others: it cannot be full. "
                     "--dataset gqa compares with one right answer.")
    if lost:
        notes.append(f"No answer can be right for {counted(len(lost), 'question')} of {len(keys):,} (first {lost[0]}): "
                     "answers are compared in lower case, without articles and punctuation, and the annotated ones are "
                     "not written so.")
    return notes


def caption_work(asked: Asked, path: Path, pictures: Sequence[CaptionedPicture], prompt: str = "",
                 limit: int | None = None) -> tuple[Work[tuple[CaptionedPicture, Any]], Score]:
    """Captions of pictures; results as COCO's server takes them, scores against the captions of `pictures`.

    Args:
        path: their file. prompt: as of `Asked.describe`.
    """
    references = {one.key: one.captions for one in pictures if not one.problem}

    def captions(lines: Sequence[Line]) -> dict[int | str, str]:
        return {line["id"]: line.get("caption", "") for line in lines if line["id"] in references}

    def answer(block: list[tuple[CaptionedPicture, Any]]) -> list[Line]:
        return [{"caption": text} for text in asked.describe([seen for _, seen in block], prompt)]

    def results(lines: Sequence[Line]) -> Any:
        return [{"image_id": key, "caption": text} for key, text in captions(lines).items()]

    def numbers(lines: Sequence[Line]) -> dict[str, Any]:
        said = captions(lines)
        more, notes = java_scores(said, references)
        if len(said) == 1:
            notes = [ONE_PICTURE, *notes]
        scores = {name: round(value, 4) for name, value in {**caption_scores(said, references), **more}.items()}
        return {**scores, "notes": notes} if notes else scores

    samples = PictureSamples([one.key for one in pictures], lambda number: pictures[number].checked(),
                             lambda one: asked.see(one.picture, path, one.name), lambda one: one.picture)
    settings = {"task": "caption", "captions": file_identity(path), "caption_prompt": prompt, **asked.facts()}
    return Work(samples, answer, settings, limit), Score(results, numbers)


def file_identity(path: Path) -> dict[str, Any]:
    """What tells a file from another version of it."""
    return {"file": str(path), "sha256": sha256_of(path)}
