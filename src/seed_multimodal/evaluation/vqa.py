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
from dataclasses import dataclass
from pathlib import Path

from seed_multimodal.config import read_table
from seed_multimodal.disk import JsonObject
from seed_multimodal.evaluation.annotations import Sample, read_questions
from seed_multimodal.evaluation.benchmark import Benchmark, Images, Line, Scores
from seed_multimodal.evaluation.metrics import group_means
from seed_multimodal.language.prompts import DEMO_QUESTIONS
from seed_multimodal.settings import setting

Rule = Callable[[str], str]  # text → normalized text
PLAIN_QUESTION = "Question: {}\nAnswer:"  # of the pretrained SEED-LLaMA
ANSWERABLE = 'Is the question: "{}" answerable?'  # of LaVIT's program for VizWiz

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# The official pattern has (?!<=\d) instead of (?<!\d), so it strips full stops not followed by a
# digit; and it passes re.UNICODE, 32, as the count.
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_FULL_STOPS = 32
_TABLES = read_table(__file__)
DIGITS: dict[str, str] = _TABLES["digits"]
_ARTICLES = ("a", "an", "the")


def _contractions() -> dict[str, str]:
    """Contractions without one of their apostrophes → with it."""
    contractions = {"somebody'd": "somebodyd"}  # the official table's one reversed entry
    for word in _TABLES["contractions"].split():
        for position, letter in enumerate(word):
            if letter == "'":
                contractions[word[:position] + word[position + 1 :]] = word
    return contractions


_CONTRACTIONS = _contractions()
UNANSWERABLE = "unanswerable"
# Of the original's program for one question.
PROBE: JsonObject = _TABLES["probe"]


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


def vqa_accuracy(
    answer: str, annotated: Sequence[str], rule: Rule = vqa_answer, official: bool = True
) -> float:
    """Accuracy (0 to 1) of an answer, normalized by `rule`, against the annotators' answers.

    The mean over annotators of the agreement with the others, where three (or all, if fewer)
    suffice. A single reference, and what is not of VQA's `official` files, is normalized, too.
    """
    # 1. Official punctuation counts only where the annotators agree.
    references = [_one_line(text) for text in annotated]
    if not official or len(references) == 1:
        references = list(map(rule, annotated))
    elif len(set(references)) > 1:
        references = [without_marks(reference) for reference in references]

    # 2. Each annotator is left out once.
    normalized = rule(answer)
    agrees = [reference == normalized for reference in references]
    if len(agrees) == 1:
        return float(agrees[0])
    n_needed = min(3, len(references) - 1)
    shares = [min(1.0, (sum(agrees) - agreement) / n_needed) for agreement in agrees]
    return sum(shares) / len(references)


def accuracies(
    samples: Sequence[Sample], lines: Sequence[Line], accuracy: Callable[[str, Sample], float]
) -> JsonObject:
    """Mean accuracies in percent, also by answer and question type; no answer counts as wrong."""
    percents: list[float] = []
    for sample, line in zip(samples, lines, strict=True):
        answered = "answer" in line
        percents.append(100 * accuracy(line["answer"], sample) if answered else 0.0)
    return {
        "accuracy": round(sum(percents) / len(percents), 2),
        "per_answer_type": group_means(percents, [sample.answer_type for sample in samples]),
        "per_question_type": group_means(percents, [sample.question_type for sample in samples]),
    }


@dataclass(kw_only=True)
class Questions(Benchmark[Sample]):
    """Questions about images, with annotators' answers.

    Without a file `question` is asked about `image`.
    """

    title = "questions about images: accuracy"
    kind = options_of = "vqa"

    file: str | Path = setting(
        "none",
        flag="--questions",
        metavar="JSON",
        help="VQA's file of questions (or a list with image, question, question_id); without it "
        "--question about --image is asked, as the original does",
    )
    truth: str | Path | None = setting(
        None,
        flag="--annotations",
        metavar="JSON",
        help="VQA's file of answers (default: --questions)",
    )
    dataset: str = setting(
        "vqav2",
        choices=("vqav2", "okvqa", "vizwiz", "gqa"),
        help="gqa: an answer is right or wrong; vizwiz: the system is first asked whether there is "
        "an answer",
    )
    image: str | None = setting(None, help="for one question (default: images/cat.jpg)")
    question: str = setting(DEMO_QUESTIONS[0], help="for one image")
    keep_ratio: bool = setting(
        False, flag="--keep_ratio", const=True, help="resize and crop, as the original's probe does"
    )

    def __post_init__(self) -> None:
        self.rule: Rule = vqa_answer
        self.as_asked: Rule = str  # a question as the prompt has it
        self.lemma: Rule = str  # a reference as answers are compared with it

    def samples(self) -> list[Sample]:
        return read_questions(self.file, self.truth)

    def answer(self, samples: Sequence[Sample], images: Images) -> list[Line]:
        lines: list[Line] = [{} for _ in samples]

        # 1. Whether the question can be answered; a "no" is the answer.
        if self.dataset == "vizwiz":
            replies = self._ask(samples, images, ANSWERABLE)
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
            if self.dataset == "gqa":  # its program
                result |= {"questionId": sample.key, "prediction": answer}
            elif sample.key == sample.image:  # VizWiz's server
                result["image"] = sample.key
            results.append(result)

        # 2. Scores.
        if not all(sample.references for sample in samples):
            return Scores(results, {}, ["No question has references, so there is no accuracy."])
        return Scores(results, accuracies(samples, lines, self._accuracy))

    def _ask(self, samples: Sequence[Sample], images: Images, template: str = "{}") -> list[str]:
        """The answers to the questions of samples, in a template."""
        # The template is of the benchmark, the plain prompt of the model.
        texts = [template.format(self.as_asked(sample.question)) for sample in samples]
        if self.prompts == "plain":
            texts = [PLAIN_QUESTION.format(text) for text in texts]
        answers = self.system.ask(images, texts, **self.text_options())
        return [self.cut(text) for text in answers]

    def _accuracy(self, answer: str, sample: Sample) -> float:
        # GQA has one right answer.
        references = [self.lemma(reference) for reference in sample.references]
        if self.dataset == "gqa":
            references = references[:1]
        return vqa_accuracy(answer, references, self.rule, sample.official)
