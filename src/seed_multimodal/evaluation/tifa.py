"""Benchmarks that ask questions about drawings: GenEval 2 and DPG-Bench.

GenEval 2 (Kamath et al. 2025, arXiv:2512.16853): `geneval2_data.jsonl`, a line a prompt with
`vqa_list` (questions with answers), `skills` and `atom_count`. Soft-TIFA is the probability of the
right answer: its arithmetic mean over a prompt's questions (AM), and its geometric mean (GM).

DPG-Bench (Hu et al. 2024, arXiv:2403.05135): `dpg_bench.csv`, a row a question with its item, the
questions that it depends on and its category; a prompt is in `prompts/ITEM.txt` or the column
`text`. A question counts only if those that it depends on are answered by yes.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar

from PIL import Image

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import DataError, ImageError, first_line
from seed_multimodal.evaluation.annotations import Json, read_items
from seed_multimodal.evaluation.answers import Line, Run, Scores
from seed_multimodal.evaluation.judged import (
    GridFiles,
    ImageLayout,
    JudgedDrawings,
    JudgedPrompt,
    SampleFolders,
    most_images,
)
from seed_multimodal.evaluation.judges import Question, answer_forms, load_judge
from seed_multimodal.evaluation.metrics import Estimate, bootstrap, plain
from seed_multimodal.pipelines.base import MultimodalSystem

DPG_COLUMNS = (
    "item_id",
    "text",
    "proposition_id",
    "dependency",
    "tuple",
    "question_natural_language",
)
# Instead of 0, which has no logarithm (as in GenEval 2's program).
LOWEST_PROBABILITY = 1e-300


@dataclass(frozen=True)
class DrawingQuestion:
    """A question; `parents`: numbers of the questions that must be answered by yes before it."""

    text: str
    answer: str
    category: str
    number: int = 0
    parents: tuple[int, ...] = ()


@dataclass
class QuestionPrompt(JudgedPrompt):
    """A prompt with questions about its drawings."""

    questions: list[DrawingQuestion] = field(default_factory=list)


# ---- GenEval 2


def read_geneval2(path: str | Path) -> list[QuestionPrompt]:
    """The prompts of `geneval2_data.jsonl`. Raises DataError: no such file, or another layout."""
    prompts: list[QuestionPrompt] = []
    for index, (location, item) in enumerate(read_items(path, "prompts")):
        prompts.append(_geneval2_prompt(index, location, item))
    return prompts


def _geneval2_prompt(index: int, location: str, item: Json) -> QuestionPrompt:
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise DataError(f"{location}: has no text 'prompt'.")
    pairs = item.get("vqa_list")
    skills = item.get("skills")
    if not isinstance(pairs, list) or not isinstance(skills, list) or len(pairs) != len(skills):
        raise DataError(f"{location}: needs as many 'skills' as questions in 'vqa_list'.")
    questions: list[DrawingQuestion] = []
    for pair, skill in zip(pairs, skills, strict=True):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise DataError(f"{location}: 'vqa_list' holds pairs of a question and its answer.")
        questions.append(DrawingQuestion(pair[0], pair[1], str(skill)))
    if not questions:
        raise DataError(f"{location}: 'vqa_list' is empty.")
    return QuestionPrompt(
        index,
        location,
        references=[item["prompt"]],
        answer_type=str(item.get("atom_count", len(questions))),
        metadata=item,
        questions=questions,
    )


class GenEval2Images(SampleFolders):
    """GenEval's layout, or the JSON file of GenEval 2's program: prompt → image."""

    def files(self, folder: Path, index: int, sample: JudgedPrompt, count: int) -> list[Path]:
        if not folder.is_file():
            return super().files(folder, index, sample, count)
        files = _image_files(folder)
        if sample.caption not in files:
            raise ImageError(f"{folder} has no image of this prompt.")
        # Below the working folder, as GenEval 2's program reads them, or below the file's.
        file = Path(files[sample.caption])
        return [file if file.is_file() else folder.parent / file]


@cache
def _image_files(file: Path) -> dict[str, str]:
    """Prompt → image of GenEval 2's JSON file. Raises DataError: not json."""
    try:
        files: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: is not json ({first_line(error)}).") from None
    return files


class AskedDrawings(JudgedDrawings):
    """A benchmark whose judge answers questions."""

    def __init__(
        self, system: MultimodalSystem | None, run: Run, samples: Sequence[QuestionPrompt]
    ) -> None:
        super().__init__(system, run, samples)
        self.judge = load_judge(self.judging.model, str(self.device))

    def line_of(self, sample: JudgedPrompt, images: Sequence[Image.Image]) -> Line:
        """The probability of the right answer to each question about each image."""
        assert isinstance(sample, QuestionPrompt)
        questions = [Question(item.text, self.answers(item)) for item in sample.questions]
        line: Line = {"caption": sample.caption, "probabilities": []}
        for image in images:
            rows = self.judge.probabilities(image, questions)
            line["probabilities"].append([self.probability(row) for row in rows])
        return line

    def answers(self, question: DrawingQuestion) -> list[list[str]]:
        """The answers whose probabilities are needed, each in several forms."""
        raise NotImplementedError

    def probability(self, probabilities: Sequence[float]) -> float:
        """The probability of the right answer, from those of `answers`."""
        raise NotImplementedError


class GenEval2(AskedDrawings):
    """The task "geneval2"."""

    layout: ClassVar[ImageLayout] = GenEval2Images()

    def answers(self, question: DrawingQuestion) -> list[list[str]]:
        return [answer_forms(question.answer)]

    def probability(self, probabilities: Sequence[float]) -> float:
        return probabilities[0]

    def score(self, samples: Sequence[QuestionPrompt], lines: Sequence[Line]) -> Scores:
        """Soft-TIFA in percent; AM also by skill, GM by number of atoms; without image: 0."""
        means: list[float] = []
        geometric: list[float] = []
        by_skill: dict[str, list[float]] = {}
        by_atoms: dict[str, list[float]] = {}
        prompts: list[int] = []
        results: list[JsonObject] = []
        captions: list[list[str]] = []
        # 1. Values of each image, also by the kinds of its questions.
        for index, (sample, line, rows) in enumerate(judged_images(samples, lines)):
            results.append({"prompt": sample.caption, "scores": rows})
            captions.append([] if "bad" in line else [f"{_geometric_mean(rows[0]):.2f}"])
            for row in rows:
                prompts.append(index)
                means.append(100 * sum(row) / len(row))
                geometric.append(100 * _geometric_mean(row))
                by_atoms.setdefault(sample.answer_type, []).append(geometric[-1])
                for question, value in zip(sample.questions, row, strict=True):
                    by_skill.setdefault(question.category, []).append(100 * value)
        if not means:
            return Scores(results, {})

        # 2. Their means, and the drawings with their values.
        self.write_sheet(samples, captions, [f"{sample.answer_type} atoms" for sample in samples])
        values: JsonObject = {
            "soft_tifa_am": plain(bootstrap(means, prompts)),
            "soft_tifa_gm": plain(bootstrap(geometric, prompts)),
            "am_per_skill": _means(by_skill),
            "gm_per_atoms": _means(by_atoms),
        }
        return Scores(results, values)


def judged_images(
    samples: Sequence[QuestionPrompt], lines: Sequence[Line]
) -> Iterator[tuple[QuestionPrompt, Line, list[list[float]]]]:
    """Each prompt with its line, and the probabilities of each image; without image: 0."""
    n_images = most_images(line["probabilities"] for line in lines if "probabilities" in line)
    for sample, line in zip(samples, lines, strict=True):
        missing = [[0.0] * len(sample.questions)] * n_images
        yield sample, line, line.get("probabilities", missing)


def _geometric_mean(row: Sequence[float]) -> float:
    logarithms = [math.log(max(value, LOWEST_PROBABILITY)) for value in row]
    return math.exp(sum(logarithms) / len(logarithms))


def _means(groups: dict[str, list[float]]) -> dict[str, float]:
    means = {name: sum(values) / len(values) for name, values in sorted(groups.items())}
    return {name: round(value, 2) for name, value in means.items()}


# ---- DPG-Bench


def read_dpg(path: str | Path) -> list[QuestionPrompt]:
    """The items of `dpg_bench.csv`. Raises DataError: no such file, or another layout."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in DPG_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{path}: has no column {missing[0]!r}.")
        prompts: dict[str, QuestionPrompt] = {}
        for row in reader:
            location = f"{path}: line {reader.line_num}"
            key = row["item_id"]
            if key not in prompts:
                prompts[key] = _dpg_prompt(path, location, row)
            prompts[key].questions.append(_dpg_question(location, row))
    if not prompts:
        raise DataError(f"{path}: has no rows.")

    # Questions may depend on later ones.
    for prompt in prompts.values():
        numbers = {question.number for question in prompt.questions}
        for question in prompt.questions:
            if not numbers.issuperset(question.parents):
                raise DataError(
                    f"{prompt.location}: question {question.number} of {prompt.key} depends on one "
                    "that is missing."
                )
    return list(prompts.values())


def _dpg_prompt(path: Path, location: str, row: dict[str, str]) -> QuestionPrompt:
    """An item without questions; its prompt is in a file, or in the row."""
    file = path.parent / "prompts" / f"{row['item_id']}.txt"
    text = row["text"]
    if file.is_file():
        text = file.read_text(encoding="utf-8").strip()
    return QuestionPrompt(row["item_id"], location, references=[text], metadata={"prompt": text})


def _dpg_question(location: str, row: dict[str, str]) -> DrawingQuestion:
    """The question of a row."""
    try:
        number = int(row["proposition_id"])
        parents = [int(parent) for parent in row["dependency"].split(",")]
    except ValueError:
        raise DataError(
            f"{location}: proposition_id and dependency are no numbers "
            f"({row['proposition_id']!r}, {row['dependency']!r})."
        ) from None
    category = row["tuple"].partition("(")[0].strip()
    needed = tuple(parent for parent in parents if parent)  # 0: none
    return DrawingQuestion(row["question_natural_language"], "yes", category, number, needed)


class DpgBench(AskedDrawings):
    """The task "dpg"."""

    layout: ClassVar[ImageLayout] = GridFiles()

    def answers(self, question: DrawingQuestion) -> list[list[str]]:
        return [answer_forms("yes"), answer_forms("no")]

    def probability(self, probabilities: Sequence[float]) -> float:
        yes, no = probabilities
        return yes / (yes + no) if yes + no else 0.0

    def score(self, samples: Sequence[QuestionPrompt], lines: Sequence[Line]) -> Scores:
        """The score in percent, and the questions of each category; without image: 0."""
        image_scores: list[float] = []
        prompts: list[int] = []
        broad: dict[str, list[float]] = {}
        detailed: dict[str, list[float]] = {}
        results: list[JsonObject] = []
        captions: list[list[str]] = []
        for index, (sample, line, rows) in enumerate(judged_images(samples, lines)):
            scores = [dpg_score(sample.questions, row) for row in rows]
            results.append({"item_id": sample.key, "scores": scores, "probabilities": rows})
            captions.append([] if "bad" in line else [f"{scores[0]:.2f}"])
            image_scores += [100 * value for value in scores]
            prompts += [index] * len(scores)
            # Categories count answers without what they depend on, as in the original program.
            for row in rows:
                for question, value in zip(sample.questions, row, strict=True):
                    answer = 100.0 * (value > 0.5)
                    detailed.setdefault(question.category, []).append(answer)
                    group = question.category.partition("-")[0].strip()
                    broad.setdefault(group, []).append(answer)
        if not image_scores:
            return Scores(results, {})

        # 2. Their means, and the drawings with their values.
        self.write_sheet(samples, captions, ["drawings"] * len(samples))
        score: Estimate = bootstrap(image_scores, prompts)
        values = {"dpg": plain(score), "per_category": _means(broad), "detailed": _means(detailed)}
        return Scores(results, values)


def dpg_score(questions: Sequence[DrawingQuestion], probabilities: Iterable[float]) -> float:
    """The share of questions that are answered by yes, as those that they depend on."""
    values: dict[int, float] = {}  # by the questions' numbers
    for question, probability in zip(questions, probabilities, strict=True):
        values[question.number] = float(probability > 0.5)
    for question in questions:
        if any(values[parent] == 0 for parent in question.parents):
            values[question.number] = 0.0
    return sum(values.values()) / len(values)
