"""SEED-Bench: multiple choice by likelihood (Li et al. 2023, arXiv:2307.16125).

The answer is the choice that the system is likeliest to generate after the question ("answer
ranking"): no letters are read out of texts. Choices are compared by the mean log-likelihood of
their tokens, as in SEED-Bench-2's programs; the first one adds them up. `SEED-Bench.json`
has {"questions": [{question_id, data_type, data_id, question, choice_a … choice_d, answer,
question_type_id}], "question_type": {name: id}}; its questions about videos are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from seed_multimodal.disk import JsonObject, read_json_object
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.annotations import Sample, read_items
from seed_multimodal.evaluation.answers import Images, Line, Run, Scores
from seed_multimodal.evaluation.vqa import accuracies
from seed_multimodal.pipelines.base import MultimodalSystem

LETTERS = "ABCD"


@dataclass
class ChoiceSample(Sample):
    """A question with its choices; its reference is the letter of the right one."""

    choices: list[str] = field(default_factory=list)


def read_choices(path: str | Path) -> list[ChoiceSample]:
    """The questions about images. Raises DataError: no such file, or another layout."""
    items = read_items(path, "questions")
    type_ids = read_json_object(Path(path), DataError).get("question_type", {})
    type_names = {identifier: name for name, identifier in type_ids.items()}
    samples: list[ChoiceSample] = []
    for location, item in items:
        if not isinstance(item, dict) or "question" not in item or "data_id" not in item:
            raise DataError(f"{location}: has no question, or no data_id.")
        if item.get("data_type", "image") != "image":
            continue
        choices = [item.get(f"choice_{letter.lower()}") for letter in LETTERS]
        answer = item.get("answer")
        is_blank = any(choice is None or not str(choice).strip() for choice in choices)
        if is_blank or answer not in tuple(LETTERS):
            raise DataError(f"{location}: needs choice_a to choice_d, and an answer of A to D.")
        samples.append(
            ChoiceSample(
                item.get("question_id", location),
                location,
                item["data_id"],
                question=item["question"],
                references=[answer],
                question_type=type_names.get(item.get("question_type_id"), ""),
                choices=[str(choice) for choice in choices],
            )
        )
    if not samples:
        raise DataError(f"{path}: has no questions about images.")
    return samples


class Choices:
    """The task "choices" with a system."""

    def __init__(self, system: MultimodalSystem, run: Run, samples: Sequence[ChoiceSample]) -> None:
        self.system = system
        self.run = run

    def answer(self, samples: Sequence[ChoiceSample], images: Images) -> list[Line]:
        """The likeliest choice of each question of a batch."""
        questions = [sample.question for sample in samples]
        choices = [sample.choices for sample in samples]
        rows = self.system.likelihoods(images, questions, choices, batch_size=self.run.batch)
        lines: list[Line] = []
        for row in rows:
            means = [likelihood.mean for likelihood in row]
            answer = LETTERS[means.index(max(means))]
            lines.append({"answer": answer, "log_likelihoods": [round(mean, 5) for mean in means]})
        return lines

    def score(self, samples: Sequence[ChoiceSample], lines: Sequence[Line]) -> Scores:
        """Results in the format of the leaderboard; accuracy in percent, also by kind."""
        answers = [line.get("answer") for line in lines]
        results: list[JsonObject] = []
        for sample, answer in zip(samples, answers, strict=True):
            results.append({"question_id": sample.key, "prediction": answer or ""})

        def is_right(answer: str, sample: Sample) -> float:
            return float(answer == sample.references[0])

        values = accuracies(samples, answers, is_right)
        del values["per_answer_type"]
        return Scores(results, values)
