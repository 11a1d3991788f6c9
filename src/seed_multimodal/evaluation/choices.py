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
from typing import Annotated, Literal

from pydantic import BaseModel, StringConstraints

from seed_multimodal.data.formats.record import parse_json
from seed_multimodal.data.formats.storage import read_all
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.annotations import Key, Sample, check_ids, parse_item, read_items
from seed_multimodal.evaluation.benchmark import Benchmark, Images, Line, Scores
from seed_multimodal.evaluation.vqa import accuracies
from seed_multimodal.settings import setting

LETTERS = "ABCD"
ChoiceText = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Item(BaseModel, coerce_numbers_to_str=True):
    """A question of the file."""

    question_id: Key | None = None
    question: str
    data_id: str
    choice_a: ChoiceText
    choice_b: ChoiceText
    choice_c: ChoiceText
    choice_d: ChoiceText
    answer: Literal["A", "B", "C", "D"]
    question_type_id: object = None


@dataclass
class ChoiceSample(Sample):
    """A question with its choices; its reference is the letter of the right one."""

    choices: list[str] = field(default_factory=list)


def read_choices(path: str | Path) -> list[ChoiceSample]:
    """The questions about images. Raises DataError: no such file, or another layout."""
    type_names: dict[object, str] = {}
    content = parse_json(read_all(path), str(path)) if Path(path).suffix == ".json" else []
    if isinstance(content, dict):
        type_names = {id: name for name, id in content.get("question_type", {}).items()}
    samples: list[ChoiceSample] = []
    for location, value in read_items(path):
        if value.get("data_type", "image") != "image":
            continue
        item = parse_item(Item, location, value)
        samples.append(
            ChoiceSample(
                location if item.question_id is None else item.question_id,
                location,
                item.data_id,
                question=item.question,
                references=[item.answer],
                question_type=type_names.get(item.question_type_id, ""),
                choices=[item.choice_a, item.choice_b, item.choice_c, item.choice_d],
            )
        )
    if not samples:
        raise DataError(f"{path}: has no questions about images.")
    check_ids(samples, path)
    return samples


@dataclass(kw_only=True)
class Choices(Benchmark[ChoiceSample]):
    """SEED-Bench."""

    title = "multiple choice by likelihood: SEED-Bench"
    kind = options_of = "choices"

    file: str | Path = setting(flag="--questions", metavar="JSON", help="SEED-Bench.json")

    def samples(self) -> list[ChoiceSample]:
        return read_choices(self.file)

    def answer(self, samples: Sequence[ChoiceSample], images: Images) -> list[Line]:
        """The likeliest choice of each question of a batch."""
        questions = [sample.question for sample in samples]
        choices = [sample.choices for sample in samples]
        rows = self.system.likelihoods(images, questions, choices, batch_size=self.batch_size)
        lines: list[Line] = []
        for row in rows:
            means = [likelihood.mean for likelihood in row]
            answer = LETTERS[means.index(max(means))]
            lines.append({"answer": answer, "log_likelihoods": [round(mean, 5) for mean in means]})
        return lines

    def score(self, samples: Sequence[ChoiceSample], lines: Sequence[Line]) -> Scores:
        """Results in the format of the leaderboard; accuracy in percent, also by kind."""
        results = [
            {"question_id": sample.key, "prediction": line.get("answer", "")}
            for sample, line in zip(samples, lines, strict=True)
        ]

        def is_right(answer: str, sample: Sample) -> float:
            return float(answer == sample.references[0])

        values = accuracies(samples, lines, is_right)
        del values["per_answer_type"]
        return Scores(results, values)
