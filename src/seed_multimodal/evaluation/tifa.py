"""Benchmarks that ask questions about drawings: GenEval 2 and DPG-Bench.

GenEval 2 (Kamath et al. 2025, arXiv:2512.16853): `geneval2_data.jsonl`, a line a prompt with
`vqa_list` (questions with answers), `skills` and `atom_count`. Soft-TIFA is the probability of the
right answer: its arithmetic mean over a prompt's questions (AM), and its geometric mean (GM).

DPG-Bench (Hu et al. 2024, arXiv:2403.05135): `dpg_bench.csv`, a row a question with its item, the
questions that it depends on and its category; a prompt is in `prompts/ITEM.txt` or the column
`text`. A question counts only if those that it depends on are answered by yes. Its images lie at
FOLDER/ITEM.png: one image, or up to four as two rows of two.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeVar

from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError, DataError, ImageError, first_line
from seed_multimodal.evaluation.annotations import parse_item, read_items
from seed_multimodal.evaluation.benchmark import Line, Scores
from seed_multimodal.evaluation.judged import (
    IMAGE_SUFFIXES,
    JudgedDrawings,
    JudgedImage,
    JudgedPrompt,
    JudgedSettings,
)
from seed_multimodal.evaluation.metrics import bootstrap, group_means, plain
from seed_multimodal.images.io import open_image, save_image

if TYPE_CHECKING:
    from seed_multimodal.evaluation.judges import QuestionJudge

Value = TypeVar("Value")
MAX_GRID = 4
# Instead of 0, which has no logarithm (as in GenEval 2's program).
LOWEST_PROBABILITY = 1e-300


@dataclass(frozen=True)
class DrawingQuestion:
    """A question; `parents`: numbers of the questions that must be answered by yes before it."""

    text: str
    answer: str
    category: str
    number: int = 0
    parents: frozenset[int] = frozenset()


@dataclass
class QuestionPrompt(JudgedPrompt):
    """A prompt with questions about its drawings."""

    questions: list[DrawingQuestion] = field(default_factory=list)


class AskedDrawings(JudgedDrawings[JudgedSettings, QuestionPrompt]):
    """A benchmark whose judge answers questions.

    wrong_answers: whose probabilities the right one is compared with.
    """

    verdicts = "probabilities"
    wrong_answers: ClassVar[tuple[str, ...]] = ()

    def prepare(self, samples: Sequence[QuestionPrompt]) -> None:
        from seed_multimodal.evaluation.judges import load_judge

        super().prepare(samples)
        self.judge_model: QuestionJudge = load_judge(
            str(self.settings.judge), str(self.judge_device)
        )

    def judge(self, sample: QuestionPrompt, images: Sequence[Image.Image]) -> list[list[float]]:
        """The probability of the right answer to each question about each image."""
        from seed_multimodal.evaluation.judges import Question, answer_forms

        questions: list[Question] = []
        for question in sample.questions:
            answers = (question.answer, *self.wrong_answers)
            questions.append(Question(question.text, [answer_forms(text) for text in answers]))
        verdicts: list[list[float]] = []
        for image in images:
            rows = self.judge_model.probabilities(image, questions)
            verdicts.append([self.right_share(row) for row in rows])
        return verdicts

    def right_share(self, row: Sequence[float]) -> float:
        """The probability of the right answer, of those of all answers if there are several."""
        total = sum(row) if self.wrong_answers else 1.0
        return row[0] / total if total else 0.0


# ---- GenEval 2


class GenEval2Item(BaseModel):
    """A line of the file."""

    prompt: str
    vqa_list: list[tuple[str, str]] = Field(min_length=1)
    skills: list[str]
    atom_count: int | None = None


def read_geneval2(path: str | Path) -> list[QuestionPrompt]:
    """The prompts of `geneval2_data.jsonl`. Raises DataError: no such file, or another layout."""
    prompts: list[QuestionPrompt] = []
    for index, (location, metadata) in enumerate(read_items(path, "prompts")):
        item = parse_item(GenEval2Item, location, metadata)
        if len(item.vqa_list) != len(item.skills):
            raise DataError(f"{location}: needs as many 'skills' as questions in 'vqa_list'.")
        prompt = QuestionPrompt(index, location, references=[item.prompt], metadata=metadata)
        prompt.answer_type = str(item.atom_count or len(item.skills))
        for (question, answer), skill in zip(item.vqa_list, item.skills, strict=True):
            prompt.questions.append(DrawingQuestion(question, answer, skill))
        prompts.append(prompt)
    return prompts


class GenEval2(AskedDrawings):
    """GenEval 2; `--image-folder` may be the JSON file of its program: prompt → image."""

    title = "questions about drawings: Soft-TIFA"
    kind = "geneval2"
    file_name = "geneval2_data.jsonl"

    def samples(self) -> list[QuestionPrompt]:
        return read_geneval2(self.settings.file)

    def files(self, sample: QuestionPrompt) -> list[Path]:
        if not self.folder.is_file():
            return super().files(sample)
        files = _image_files(self.folder)
        if sample.caption not in files:
            raise ImageError(f"{self.folder} has no image of this prompt.")
        # Below the working folder, as GenEval 2's program reads them, or below the file's.
        file = Path(files[sample.caption])
        return [file if file.is_file() else self.folder.parent / file]

    def score(self, samples: Sequence[QuestionPrompt], lines: Sequence[Line]) -> Scores:
        """Soft-TIFA in percent; AM also by skill, GM by number of atoms; without image: 0."""
        # 1. Values of each image.
        images = self.judged_images(samples, lines)
        if not images:
            return Scores([], {})
        rows = [probabilities(image) for image in images]
        arithmetic = [100 * sum(row) / len(row) for row in rows]
        geometric = [100 * _geometric_mean(row) for row in rows]

        # 2. Their means, also by the kinds of questions.
        prompts = [image.index for image in images]
        skills = [item.category for image in images for item in image.sample.questions]
        atoms = [image.sample.answer_type for image in images]
        values: JsonObject = {
            "soft_tifa_am": plain(bootstrap(arithmetic, prompts)),
            "soft_tifa_gm": plain(bootstrap(geometric, prompts)),
            "am_per_skill": group_means([100 * value for row in rows for value in row], skills),
            "gm_per_atoms": group_means(geometric, atoms),
        }

        # 3. The results of prompts, and the drawings with their values.
        captions = [f"{value / 100:.2f}" for value in geometric]
        self.write_sheet(images, captions, [f"{count} atoms" for count in atoms])
        results: list[JsonObject] = [
            {"prompt": sample.caption, "scores": scores}
            for sample, scores in zip(samples, by_prompt(images, rows), strict=True)
        ]
        return Scores(results, values)


@cache
def _image_files(file: Path) -> dict[str, str]:
    """Prompt → image of GenEval 2's JSON file. Raises DataError: not json."""
    try:
        files: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: is not json ({first_line(error)}).") from None
    return files


def probabilities(image: JudgedImage) -> list[float]:
    """The probability of the right answer to each question; without image: 0."""
    row: list[float] = image.verdict or [0.0] * len(image.sample.questions)
    return row


def by_prompt(images: Sequence[JudgedImage], values: Sequence[Value]) -> list[list[Value]]:
    """The values of images in a list for each prompt."""
    groups: dict[int, list[Value]] = {}
    for image, value in zip(images, values, strict=True):
        groups.setdefault(image.index, []).append(value)
    return list(groups.values())


def _geometric_mean(row: Sequence[float]) -> float:
    logarithms = [math.log(max(value, LOWEST_PROBABILITY)) for value in row]
    return math.exp(sum(logarithms) / len(logarithms))


# ---- DPG-Bench


class DpgRow(BaseModel):
    """A row of the file; `dependency`: numbers, 0 for none."""

    item_id: str
    text: str
    proposition_id: int
    dependency: Annotated[list[int], BeforeValidator(lambda text: text.split(","))]
    tuple: str
    question_natural_language: str


def read_dpg(path: str | Path) -> list[QuestionPrompt]:
    """The items of `dpg_bench.csv`. Raises DataError: no such file, or another layout."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    prompts: dict[str, QuestionPrompt] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for values in reader:
            location = f"{path}: line {reader.line_num}"
            row = parse_item(DpgRow, location, values)
            if row.item_id not in prompts:
                prompts[row.item_id] = _dpg_prompt(path, location, row)
            category = row.tuple.partition("(")[0].strip()
            parents = frozenset(row.dependency) - {0}
            prompts[row.item_id].questions.append(
                DrawingQuestion(
                    row.question_natural_language, "yes", category, row.proposition_id, parents
                )
            )
    if not prompts:
        raise DataError(f"{path}: has no rows.")

    # Questions may depend on later ones.
    for prompt in prompts.values():
        numbers = {question.number for question in prompt.questions}
        for question in prompt.questions:
            if not question.parents <= numbers:
                raise DataError(
                    f"{prompt.location}: question {question.number} of {prompt.key} depends on one "
                    "that is missing."
                )
    return list(prompts.values())


def _dpg_prompt(path: Path, location: str, row: DpgRow) -> QuestionPrompt:
    """An item without questions; its prompt is in a file, or in the row."""
    file = path.parent / "prompts" / f"{row.item_id}.txt"
    text = row.text
    if file.is_file():
        text = file.read_text(encoding="utf-8").strip()
    return QuestionPrompt(row.item_id, location, references=[text], metadata={"prompt": text})


class DpgBench(AskedDrawings):
    """DPG-Bench; several images are tiles of a grid."""

    title = "questions about drawings of long prompts: DPG-Bench"
    kind = "dpg"
    file_name = "dpg_bench.csv"
    num_images = MAX_GRID
    wrong_answers = ("no",)

    def samples(self) -> list[QuestionPrompt]:
        if self.count > MAX_GRID:
            raise ConfigError(f"A grid holds {MAX_GRID} images at most, not {self.count}.")
        return read_dpg(self.settings.file)

    def save(self, sample: QuestionPrompt, images: Sequence[Image.Image]) -> None:
        image = images[0]
        if len(images) > 1:
            width, height = image.size
            image = Image.new("RGB", (2 * width, 2 * height))
            for number, tile in enumerate(images):
                image.paste(tile, (number % 2 * width, number // 2 * height))
        save_image(image, self.folder / f"{sample.key}.png", DataError)

    def files(self, sample: QuestionPrompt) -> list[Path]:
        names = [self.folder / f"{sample.key}{suffix}" for suffix in IMAGE_SUFFIXES]
        files = [name for name in names if name.is_file()]
        if not files:
            raise ImageError(f"there is no image {names[0]}.")
        return files[:1]

    def read(self, sample: QuestionPrompt) -> list[Image.Image]:
        [image] = [open_image(file).image for file in self.files(sample)]
        if self.count == 1:
            return [image]
        width, height = (side // 2 for side in image.size)
        tiles: list[Image.Image] = []
        for number in range(self.count):
            left, top = number % 2 * width, number // 2 * height
            tiles.append(image.crop((left, top, left + width, top + height)))
        return tiles

    def score(self, samples: Sequence[QuestionPrompt], lines: Sequence[Line]) -> Scores:
        """The score in percent, and the questions of each category; without image: 0."""
        # 1. Values of each image.
        images = self.judged_images(samples, lines)
        if not images:
            return Scores([], {})
        rows = [probabilities(image) for image in images]
        scores: list[float] = []
        for image, row in zip(images, rows, strict=True):
            scores.append(dpg_score(image.sample.questions, row))

        # 2. Their means. Categories count answers without what they depend on, as in the original
        #    program.
        prompts = [image.index for image in images]
        answers = [100.0 * (value > 0.5) for row in rows for value in row]
        detailed = [item.category for image in images for item in image.sample.questions]
        broad = [category.partition("-")[0].strip() for category in detailed]
        values = {
            "dpg": plain(bootstrap([100 * score for score in scores], prompts)),
            "per_category": group_means(answers, broad),
            "detailed": group_means(answers, detailed),
        }

        # 3. The results of items, and the drawings with their values.
        captions = [f"{score:.2f}" for score in scores]
        self.write_sheet(images, captions, ["drawings"] * len(images))
        results: list[JsonObject] = []
        for sample, item_scores, item_rows in zip(
            samples, by_prompt(images, scores), by_prompt(images, rows), strict=True
        ):
            results.append(
                {"item_id": sample.key, "scores": item_scores, "probabilities": item_rows}
            )
        return Scores(results, values)


def dpg_score(questions: Sequence[DrawingQuestion], probabilities: Sequence[float]) -> float:
    """The share of questions that are answered by yes, as those that they depend on."""
    values: dict[int, float] = {}  # by the questions' numbers
    for question, probability in zip(questions, probabilities, strict=True):
        values[question.number] = float(probability > 0.5)
    for question in questions:
        if any(values[parent] == 0 for parent in question.parents):
            values[question.number] = 0.0
    return sum(values.values()) / len(values)
