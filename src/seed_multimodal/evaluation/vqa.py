"""VQA accuracy of the official evaluation (VQA v1 and v2, OK-VQA; Antol et al. 2015).

    # 1.0: three of the other nine agree, every time
    vqa_accuracy("two dogs", ["2 dogs"] * 4 + ["dogs"] * 6)

With the official program's quirks: answers are normalized; annotators' answers only lose
punctuation, and only if they differ. The accuracy is the mean over the ten annotators of min(1,
equal answers of the other nine / 3). `Questions` runs a system.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from seed_multimodal.disk import JsonObject
from seed_multimodal.evaluation.annotations import Sample
from seed_multimodal.evaluation.answers import Images, Line, Run, Scores
from seed_multimodal.evaluation.metrics import FloatArray
from seed_multimodal.pipelines.base import MultimodalSystem

Rule = Callable[[str], str]  # text → normalized text
PLAIN_QUESTION = "Question: {}\nAnswer:"  # of the pretrained SEED-LLaMA

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# The official pattern has (?!<=\d) instead of (?<!\d), so it strips full stops not followed by a
# digit; and it passes re.UNICODE, 32, as the count.
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_FULL_STOPS = 32
DIGITS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = ("a", "an", "the")
_WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've""".split()


def _contractions() -> dict[str, str]:
    """Contractions without one of their apostrophes → with it."""
    contractions = {"somebody'd": "somebodyd"}  # the official table's one reversed entry
    for word in _WITH_APOSTROPHES:
        for position, letter in enumerate(word):
            if letter == "'":
                contractions[word[:position] + word[position + 1 :]] = word
    return contractions


_CONTRACTIONS = _contractions()
UNANSWERABLE = "unanswerable"


def without_marks(text: str) -> str:
    """The official punctuation rule.

    Marks at a blank are removed, others become blanks; all are removed if a number has a comma.
    """
    has_comma_in_number = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _MARKS:
        is_at_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if has_comma_in_number or is_at_blank else " ")
    return _FULL_STOP.sub("", cleaned, count=_MAX_FULL_STOPS)


def vqa_answer(text: str, digits: Mapping[str, str] = DIGITS) -> str:
    """Normalized answer.

    No punctuation, lower case, digits for number words up to ten, no articles, apostrophes in
    contractions.
    """
    normalized = []
    for word in without_marks(_one_line(text)).lower().split():
        word = digits.get(word, word)
        if word not in _ARTICLES:
            normalized.append(_CONTRACTIONS.get(word, word))
    return " ".join(normalized)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, annotated: Sequence[str], rule: Rule = vqa_answer) -> float:
    """Accuracy (0 to 1) of an answer, normalized by `rule`, against the annotators' answers.

    The mean over annotators of the agreement with the others, where three (or all, if fewer)
    suffice. A single reference is normalized, too.
    """
    if len(annotated) == 1:
        return float(rule(answer) == rule(annotated[0]))

    # Punctuation counts only where the annotators agree.
    references = [_one_line(text) for text in annotated]
    if len(set(references)) > 1:
        references = [without_marks(reference) for reference in references]

    # Each annotator is left out once.
    normalized = rule(answer)
    agrees = [reference == normalized for reference in references]
    n_needed = min(3, len(references) - 1)
    shares = [min(1.0, (sum(agrees) - agreement) / n_needed) for agreement in agrees]
    return sum(shares) / len(references)


def accuracies(
    samples: Sequence[Sample],
    answers: Sequence[str | None],
    accuracy: Callable[[str, Sample], float],
) -> dict[str, float | dict[str, float]]:
    """Mean accuracies in percent, also by answer and question type; None counts as wrong."""
    # Accuracy of each sample.
    percents = np.zeros(len(samples))
    for index, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        if answer is not None:
            percents[index] = 100 * accuracy(answer, sample)

    return {
        "accuracy": round(float(percents.mean()), 2),
        "per_answer_type": _means(percents, [sample.answer_type for sample in samples]),
        "per_question_type": _means(percents, [sample.question_type for sample in samples]),
    }


def _means(percents: FloatArray, types: Sequence[str]) -> dict[str, float]:
    """The mean of the percents [N] of each type, without those of samples that have none."""
    means: dict[str, float] = {}
    for name in sorted(set(types) - {""}):
        means[name] = round(float(percents[np.array(types) == name].mean()), 2)
    return means


class Questions:
    """The task "vqa" with a system."""

    def __init__(self, system: MultimodalSystem, run: Run, samples: Sequence[Sample]) -> None:
        self.system = system
        self.run = run
        self.rule: Rule = vqa_answer
        self.question: Rule = str  # a question as the prompt has it
        self.lemma: Rule = str  # a reference as answers are compared with it

    def answer(self, samples: Sequence[Sample], images: Images) -> list[Line]:
        """Answer a batch."""
        lines: list[Line] = [{} for _ in samples]

        # 1. Some benchmarks first ask whether the question can be answered.
        first_question = self.run.task.first
        if first_question:
            replies = self._ask(samples, images, first_question)
            for line, text in zip(lines, replies, strict=True):
                line["answerable"] = text
                if re.search(r"\bno\b", text.lower()):
                    line["answer"] = UNANSWERABLE

        # 2. The questions; tuned models end answers with a full stop.
        open_rows = [row for row, line in enumerate(lines) if "answer" not in line]
        answers = self._ask([samples[row] for row in open_rows], [images[row] for row in open_rows])
        for row, text in zip(open_rows, answers, strict=True):
            lines[row]["answer"] = text.removesuffix(".")
        return lines

    def score(self, samples: Sequence[Sample], lines: Sequence[Line]) -> Scores:
        """Results in the format of VQA's server, and scores where there are references."""
        # 1. Results.
        results: list[JsonObject] = []
        for sample, line in zip(samples, lines, strict=True):
            answer = line.get("answer", "")
            result: JsonObject = {"question_id": sample.key, "answer": answer}
            if self.run.task.exact:  # GQA's program
                result |= {"questionId": sample.key, "prediction": answer}
            elif sample.key == sample.image:  # VizWiz's server
                result["image"] = sample.key
            results.append(result)

        # 2. Scores.
        if not samples or not all(sample.references for sample in samples):
            return Scores(results, {})
        answers = [line.get("answer") for line in lines]
        return Scores(results, accuracies(samples, answers, self._accuracy))

    def _ask(self, samples: Sequence[Sample], images: Images, template: str = "{}") -> list[str]:
        """The answers to the questions of samples, in a template."""
        # The template is of the benchmark, the plain prompt of the model.
        texts = [template.format(self.question(sample.question)) for sample in samples]
        if self.run.prompts == "plain":
            texts = [PLAIN_QUESTION.format(text) for text in texts]
        answers = self.system.ask(images, texts, batch_size=self.run.batch, **self.run.options)
        return [self.run.cut(text) for text in answers]

    def _accuracy(self, answer: str, sample: Sample) -> float:
        # GQA has one right answer.
        references = [self.lemma(reference) for reference in sample.references]
        if self.run.task.exact:
            references = references[:1]
        return vqa_accuracy(answer, references, self.rule)
