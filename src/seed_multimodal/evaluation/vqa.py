"""VQA accuracy of the official evaluation (VQA v1 and v2, OK-VQA; Antol et al. 2015), including its quirks.

    vqa_accuracy("two dogs", ["2 dogs"] * 4 + ["dogs"] * 6)      # 1.0: three of the other nine agree, every time

Answers are normalized; annotators' answers only lose punctuation, and only if they differ. The accuracy is the mean
over the ten annotators of min(1, equal answers of the other nine / 3). `Questions` runs a system.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.answers import LEMMATISED, Line, Run
from seed_multimodal.lavit.pipeline import Lavit
from seed_multimodal.lavit.processing import Lemmatizer, QuestionProcessor

Rule = Callable[[str], str]
PLAIN_QUESTION = "Question: {}\nAnswer:"  # of the pretrained SEED-LLaMA

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# The official pattern has (?!<=\d) instead of (?<!\d), so it strips full stops not followed by a digit; and it passes
# re.UNICODE, 32, as the count.
_STOP, _MOST_STOPS = re.compile(r"\.(?!\d)"), 32
_NUMBERS = {
    "none": "0",
    **{
        word: str(number)
        for number, word in enumerate(
            "zero one two three four five six seven eight nine ten".split()
        )
    },
}
_ARTICLES = ("a", "an", "the")
_WHOLE = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
# Contractions without their apostrophe, and the official table's one reversed entry.
_CONTRACTIONS = {
    "somebody'd": "somebodyd",
    **{
        word[:place] + word[place + 1 :]: word
        for word in _WHOLE
        for place, letter in enumerate(word)
        if letter == "'"
    },
}
# LaVIT's rule: prefixes of answers that are removed in this order, each once.
_OPENINGS = ("it is", "this is", "she's", "very", "for", "to", "in", "on", "at", "a", "an", "the")
_NO_ANSWERS = ("i don't know", "i do n't know", "i need to know", "")
UNANSWERABLE = "unanswerable"


def without_marks(text: str) -> str:
    """The official punctuation rule: marks at a blank are removed, others become blanks; all are removed if a number
    contains a comma."""
    number, made = re.search(r"\d,\d", text) is not None, text
    for mark in _MARKS:
        made = made.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    return _STOP.sub("", made, count=_MOST_STOPS)


def vqa_answer(text: str, numbers: Mapping[str, str] = _NUMBERS) -> str:
    """Normalized answer: no punctuation, lower case, digits for number words up to ten, no articles, apostrophes in
    contractions."""
    words = without_marks(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    kept = [word for word in (numbers.get(word, word) for word in words) if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


def lavit_answer(text: str) -> str:
    """LaVIT's rule: `vqa_answer` with "no" for "nope", without prefixes like "it is", "unanswerable" for "I don't
    know"."""
    found = vqa_answer(text, {**_NUMBERS, "nope": "no"})
    if found in _NO_ANSWERS:
        return UNANSWERABLE
    for words in _OPENINGS:
        found = found.removeprefix(f"{words} ").strip()
    return found or UNANSWERABLE


def vqa_accuracy(answer: str, annotated: Sequence[str], rule: Rule = vqa_answer) -> float:
    """Accuracy (0 to 1) of an answer, normalized by `rule`, against the annotators' answers: mean over annotators of
    agreement with the others, where three (or all, if fewer) suffice. A single reference is normalized, too.
    """
    if len(annotated) == 1:
        return float(rule(answer) == rule(annotated[0]))
    wanted = [one.replace("\n", " ").replace("\t", " ").strip() for one in annotated]
    if len(set(wanted)) > 1:
        wanted = [without_marks(one) for one in wanted]
    found = rule(answer)
    equal = sum(one == found for one in wanted)
    enough = min(3, len(wanted) - 1)
    return sum(min(1.0, (equal - (one == found)) / enough) for one in wanted) / len(wanted)


def accuracies(
    samples: Sequence[Sample],
    answers: Sequence[str | None],
    accuracy: Callable[[str, Sample], float],
) -> dict[str, Any]:
    """Mean accuracies in percent: overall, by answer type and by question type; None counts as wrong."""
    values = np.array(
        [
            0.0 if answer is None else 100 * accuracy(answer, sample)
            for sample, answer in zip(samples, answers, strict=True)
        ]
    )
    found: dict[str, Any] = {"accuracy": round(float(values.mean()), 2)}
    for name in ("answer_type", "question_type"):
        kinds = np.array([getattr(one, name) for one in samples])
        found[f"per_{name}"] = {
            str(kind): round(float(values[kinds == kind].mean()), 2)
            for kind in np.unique(kinds)
            if kind
        }
    return found


class Questions:
    """The task "vqa" with a system."""

    def __init__(self, system: Any, run: Run, samples: Sequence[Sample]) -> None:
        self.system, self.run = system, run
        lavit = isinstance(system, Lavit)
        self.rule: Rule = lavit_answer if lavit else vqa_answer
        # nano-lavit uses its training prompt, the unchanged question.
        self.question: Rule = QuestionProcessor() if lavit and system.config.original else str
        self.lemma: Rule = str
        if (
            lavit and LEMMATISED not in (run.truth or run.annotations).stem
        ):  # LaVIT's references are lemmatized
            self.lemma = system.lemmatizer = system.lemmatizer or Lemmatizer()

    def answer(self, samples: Sequence[Sample], images: Sequence[Any]) -> list[Line]:
        """Answer a batch."""
        lines: list[Line] = [{} for _ in samples]
        if first := self.run.task.first:
            for line, text in zip(lines, self._ask(samples, images, first), strict=True):
                line["answerable"] = text
                if re.search(r"\bno\b", text.lower()):
                    line["answer"] = UNANSWERABLE
        left = [row for row, line in enumerate(lines) if "answer" not in line]
        answers = self._ask([samples[row] for row in left], [images[row] for row in left])
        for row, text in zip(left, answers, strict=True):
            lines[row]["answer"] = text.removesuffix(
                "."
            )  # tuned models end answers with a full stop
        return lines

    def score(
        self, samples: Sequence[Sample], lines: Mapping[Any, Line]
    ) -> tuple[Any, dict[str, Any]]:
        """Results in the format of VQA's server, with the keys of GQA's program and VizWiz's server; scores."""
        answers = [lines[one.key].get("answer") for one in samples]
        results = [
            {
                "question_id": one.key,
                "answer": answer or "",
                **(
                    {"questionId": one.key, "prediction": answer or ""}
                    if self.run.task.exact
                    else {"image": one.key}
                    if one.key == one.image
                    else {}
                ),
            }
            for one, answer in zip(samples, answers, strict=True)
        ]
        scored = samples and all(one.references for one in samples)
        return results, accuracies(samples, answers, self._accuracy) if scored else {}

    def _ask(
        self, samples: Sequence[Sample], images: Sequence[Any], template: str = "{}"
    ) -> list[str]:
        plain = self.run.prompts == "plain"
        texts = [template.format(self.question(one.question)) for one in samples]
        texts = [PLAIN_QUESTION.format(text) if plain else text for text in texts]
        answers = self.system.ask(images, texts, batch_size=self.run.batch, **self.run.options)
        return [self.run.cut(text) for text in answers]

    def _accuracy(self, answer: str, sample: Sample) -> float:
        wanted = [self.lemma(one) for one in sample.references]
        return vqa_accuracy(answer, wanted[:1] if self.run.task.exact else wanted, self.rule)
