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

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Annotated, ClassVar

from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field

from seed_multimodal.disk import JsonObject, read_json_object
from seed_multimodal.errors import ConfigError, DataError, ImageError
from seed_multimodal.evaluation.annotations import parse_item, read_items
from seed_multimodal.evaluation.benchmark import Line, Scores
from seed_multimodal.evaluation.judged import (
    IMAGE_SUFFIXES,
    JudgedDrawings,
    JudgedImage,
    JudgedPrompt,
    estimate,
)
from seed_multimodal.evaluation.metrics import group_means, grouped
from seed_multimodal.images.io import open_image, save_image

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


class AskedDrawings(JudgedDrawings[QuestionPrompt]):
    """A benchmark whose judge answers questions.

    wrong_answers: whose probabilities the right one is compared with.
    """

    verdicts = "probabilities"
    wrong_answers: ClassVar[tuple[str, ...]] = ()

    def prepare(self, samples: Sequence[QuestionPrompt]) -> None:
        from seed_multimodal.evaluation.judges import load_judge

        super().prepare(samples)
        self.judge_model = load_judge(str(self.judge), self.judge_device)

    def judged(self, sample: QuestionPrompt, images: Sequence[Image.Image]) -> list[list[float]]:
        """The probability of the right answer to each question about each image."""
        from seed_multimodal.evaluation.judges import Question, answer_forms

        questions: list[Question] = []
        for question in sample.questions:
            answers = (question.answer, *self.wrong_answers)
            questions.append(Question(question.text, [answer_forms(text) for text in answers]))
        verdicts: list[list[float]] = []
        for image in images:
            rows = self.judge_model.probabilities(image, questions)
            shares: list[float] = []
            for row in rows:
                # Of those of all answers, if there are several.
                total = sum(row) if self.wrong_answers else 1.0
                shares.append(row[0] / total if total else 0.0)
            verdicts.append(shares)
        return verdicts

    def score(self, samples: Sequence[QuestionPrompt], lines: Sequence[Line]) -> Scores:
        """Results of the prompts, and means over images; questions without image count 0."""
        images = self.judged_images(samples, lines)
        for image in images:
            image.verdict = image.verdict or [0.0] * len(image.sample.questions)
            image.score = self.image_score(image.sample.questions, image.verdict)
            image.caption = f"{image.score:.2f}"
        self.write_sheet(images)
        of_prompts = grouped(images, [image.sample.index for image in images])
        results = [self.result(of_prompts[sample.index]) for sample in samples]
        return Scores(results, self.means(images))

    def image_score(self, questions: Sequence[DrawingQuestion], shares: Sequence[float]) -> float:
        """The score of an image by the shares of the right answers, 0 to 1."""
        raise NotImplementedError

    def result(self, images: Sequence[JudgedImage]) -> JsonObject:
        """The result of a prompt with these images."""
        raise NotImplementedError

    def means(self, images: Sequence[JudgedImage]) -> JsonObject:
        """The figures of the paper, in percent."""
        raise NotImplementedError


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
    for index, (location, metadata) in enumerate(read_items(path)):
        item = parse_item(GenEval2Item, location, metadata)
        if len(item.vqa_list) != len(item.skills):
            raise DataError(f"{location}: needs as many 'skills' as questions in 'vqa_list'.")
        prompt = QuestionPrompt(index, location, references=[item.prompt], metadata=metadata)
        prompt.answer_type = str(item.atom_count or len(item.skills))
        prompt.group = f"{prompt.answer_type} atoms"
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
        return read_geneval2(self.file)

    @cached_property
    def file_names(self) -> JsonObject:
        """Prompt → image of the program's JSON file."""
        return read_json_object(self.folder, DataError)

    def files(self, sample: QuestionPrompt) -> list[Path]:
        if not self.folder.is_file():
            return super().files(sample)
        if sample.caption not in self.file_names:
            raise ImageError(f"{self.folder} has no image of this prompt.")
        # Below the working folder, as GenEval 2's program reads them, or below the file's.
        file = Path(self.file_names[sample.caption])
        return [file if file.is_file() else self.folder.parent / file]

    def image_score(self, questions: Sequence[DrawingQuestion], shares: Sequence[float]) -> float:
        """Soft-TIFA GM."""
        return geometric_mean([max(share, LOWEST_PROBABILITY) for share in shares])

    def result(self, images: Sequence[JudgedImage]) -> JsonObject:
        prompt = images[0].sample.caption
        return {"prompt": prompt, "scores": [image.verdict for image in images]}

    def means(self, images: Sequence[JudgedImage]) -> JsonObject:
        """Soft-TIFA; AM also by skill, GM by number of atoms."""
        scores = [100 * image.score for image in images]
        shares = [100 * share for image in images for share in image.verdict]
        return {
            "soft_tifa_am": estimate(images, [100 * fmean(image.verdict) for image in images]),
            "soft_tifa_gm": estimate(images, scores),
            "am_per_skill": group_means(shares, categories(images)),
            "gm_per_atoms": group_means(scores, [image.sample.answer_type for image in images]),
        }


def categories(images: Sequence[JudgedImage]) -> list[str]:
    """The category of each question about each image."""
    return [question.category for image in images for question in image.sample.questions]


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
    rows: dict[str, list[DpgRow]] = {}
    locations: dict[str, str] = {}
    for location, values in read_items(path):
        row = parse_item(DpgRow, location, values)
        rows.setdefault(row.item_id, []).append(row)
        locations.setdefault(row.item_id, location)
    return [_dpg_prompt(path, locations[item], of_item) for item, of_item in rows.items()]


def _dpg_prompt(path: str | Path, location: str, rows: Sequence[DpgRow]) -> QuestionPrompt:
    """An item with its questions; its prompt is in a file, or in the rows."""
    item = rows[0].item_id
    text = rows[0].text
    file = Path(path).parent / "prompts" / f"{item}.txt"
    if file.is_file():
        text = file.read_text(encoding="utf-8-sig").strip()
    prompt = QuestionPrompt(item, location, references=[text], metadata={"prompt": text})

    # Questions may depend on later ones.
    numbers = {row.proposition_id for row in rows}
    for row in rows:
        parents = frozenset(row.dependency) - {0}
        number = row.proposition_id
        if not parents <= numbers:
            raise DataError(
                f"{location}: question {number} of {item} depends on one that is missing."
            )
        category = row.tuple.partition("(")[0].strip()
        prompt.questions.append(
            DrawingQuestion(row.question_natural_language, "yes", category, number, parents)
        )
    return prompt


class DpgBench(AskedDrawings):
    """DPG-Bench; several images are tiles of a grid."""

    title = "questions about drawings of long prompts: DPG-Bench"
    kind = "dpg"
    file_name = "dpg_bench.csv"
    images_per_prompt = MAX_GRID
    wrong_answers = ("no",)

    def samples(self) -> list[QuestionPrompt]:
        if self.count > MAX_GRID:
            raise ConfigError(f"A grid holds {MAX_GRID} images at most, not {self.count}.")
        return read_dpg(self.file)

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

    def image_score(self, questions: Sequence[DrawingQuestion], shares: Sequence[float]) -> float:
        """The share of questions that are answered by yes, as those that they depend on."""
        # By the questions' numbers.
        values = {
            question.number: float(share > 0.5)
            for question, share in zip(questions, shares, strict=True)
        }
        for question in questions:
            if any(values[parent] == 0 for parent in question.parents):
                values[question.number] = 0.0
        return sum(values.values()) / len(values)

    def result(self, images: Sequence[JudgedImage]) -> JsonObject:
        return {
            "item_id": images[0].sample.key,
            "scores": [image.score for image in images],
            "probabilities": [image.verdict for image in images],
        }

    def means(self, images: Sequence[JudgedImage]) -> JsonObject:
        """The score, and the questions of each category.

        Categories count answers without what they depend on, as in the original program.
        """
        answers = [100.0 * (share > 0.5) for image in images for share in image.verdict]
        detailed = categories(images)
        broad = [category.partition("-")[0].strip() for category in detailed]
        return {
            "dpg": estimate(images, [100 * image.score for image in images]),
            "per_category": group_means(answers, broad),
            "detailed": group_means(answers, detailed),
        }
