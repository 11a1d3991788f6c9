"""LaVIT's published evaluation: captions of three sets, answers of four, drawings of COCO's captions.

    summary = run_task(lavit, Task("vqa", "vizwiz", "val_answerable.json", images="vizwiz"))

Captions and answers are those of `describe` and `ask` as published; drawings take other settings (`DRAWING`) and belong
to the pixel decoder of 512 pixels. Ground truth is looked for where the released programs expected it, then beside the
annotations, and else taken from the annotations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.data.formats.benchmark_files import Annotations, Questions
from seed_multimodal.data.formats.caption_files import read_captions
from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation.answer_folder import Line, Score, Work, run_through
from seed_multimodal.evaluation.asking import AnySystem
from seed_multimodal.evaluation.benchmark_work import QuestionRules, caption_work, question_work
from seed_multimodal.evaluation.drawing_work import BestOf
from seed_multimodal.evaluation.picture_scores import ClipScores, Distance, find_clip
from seed_multimodal.language.lavit import QuestionProcessor
from seed_multimodal.language.lemmatizer import Lemmatizer
from seed_multimodal.settings import check_value, nearest
from seed_multimodal.systems.lavit import Lavit

SEED = 42
DRAWN = 4  # pictures of a caption, of which CLIP keeps one
DRAWING: Mapping[str, Any] = {"top_k": 300, "top_p": 1.0, "guidance": 1.5, "guidance_scale": 1.5,
                              "num_inference_steps": 50}
LEMMATISED = "_lemm"  # in the names of files of answers that the authors have lemmatised
# Set → its ground truth, as the released programs name it: by a path, then by a name beside the annotations.
CAPTIONS = {"coco": "data/coco_gt/coco_karpathy_test_gt.json", "nocaps": "data/nocaps/nocaps_val_4500_captions.json",
            "flickr": "data/flickr30k/flickr30k_test_gt.json"}
QUESTIONS = {"vqav2": "v2_mscoco_val2014_annotations_lemm.json", "okvqa": "mscoco_val2014_annotations_lemm.json",
             "vizwiz": "vizwiz_val_annotations_lemm.json", "gqa": ""}
TASKS = {"vqa": tuple(QUESTIONS), "caption": tuple(CAPTIONS), "text2image": ("coco",)}


@dataclass(frozen=True)
class Task:
    """What is evaluated on what.

    Attributes:
        name: "vqa", "caption" or "text2image". dataset: of `TASKS`.
        annotations: the file. images: folder of the pictures (None: beside the file).
        truth: file of the ground truth; None: it is looked for.
        out: folder of the results; None: tmp/NAME/DATASET.
        limit: the first samples only. batch: samples at a time.
        legacy: scored as the original was, see `QuestionRules`.
        clip, clip_words, inception: see `find_clip`, `ClipScores.load` and `Distance`. weights: LaVIT's folder, which
            may hold the CLIP. resolution: of real pictures for FID. drawing: settings of `draw`.
    """

    name: str
    dataset: str
    annotations: str | Path
    images: str | Path | None = None
    truth: str | Path | None = None
    out: str | Path | None = None
    limit: int | None = None
    batch: int = 2
    legacy: bool = False
    clip: str | Path | None = None
    clip_words: str | Path | None = None
    inception: str | Path | None = None
    weights: Path | None = None
    resolution: int = 512
    drawing: Mapping[str, Any] = field(default_factory=lambda: DRAWING)

    def __post_init__(self) -> None:
        check_value(str, self.name, "task_name", choices=tuple(TASKS))
        known = TASKS[self.name]
        if self.dataset not in known:
            raise ConfigError(f"The task {self.name} has no dataset {self.dataset!r}{nearest(self.dataset, known)}; "
                              f"use {', '.join(known)}.")

    @property
    def folder(self) -> Path:
        """Of the results."""
        return Path(self.out) if self.out is not None else Path("tmp") / self.name / self.dataset


def run_task(system: Lavit, task: Task) -> Line | None:
    """Evaluate a `Lavit`, alone or under torchrun; the same call resumes.

    Returns:
        The summary, of the process that ends last; else None.

    Raises:
        DataError, CheckpointError, ConfigError: files, weights or settings that are not there or wrong.
    """
    work, score = task_work(system, task)
    return run_through(work, score, task.folder, batch=task.batch, name=task.dataset)


def task_work(system: Lavit, task: Task) -> tuple[Work[Any], Score]:
    """A task as `run_through` takes it; errors as of `run_task`."""
    images = None if task.images is None else Path(task.images)
    asked = AnySystem(system, {"seed": SEED}, dict(task.drawing), question_words(system), images)
    file = Path(task.annotations)
    if task.name == "caption":
        truth = task.truth or find_truth(CAPTIONS[task.dataset], file)
        return caption_work(asked, file, read_captions(file, truth=truth), "", task.limit)
    if task.name == "text2image":
        device = system.pictures.device
        clip = ClipScores.load(find_clip(task.clip, *([task.weights] if task.weights else [])), device, task.clip_words)
        distance = Distance(task.resolution, task.inception, device=device)
        texts = read_captions(file, drawn=True)
        return BestOf(asked, file, texts, task.folder, DRAWN, 0, clip, distance).work(task.limit)
    truth = task.truth or find_truth(QUESTIONS[task.dataset], file)
    questions, answers = Questions(file), Annotations(truth or file)
    answers.require(questions, task.limit)
    return question_work(asked, questions, answers, task.limit, question_rules(
        task.dataset, Path(truth or file), system, legacy=task.legacy))


def question_words(system: Any) -> Callable[[str], str]:
    """What is made of a question before it is asked: as the published LaVIT was evaluated; any other system, nano-lavit
    and its kind too, is asked as it was trained, with the question as it is written."""
    return QuestionProcessor() if isinstance(system, Lavit) and system.spec.released else str


def question_rules(dataset: str, truth: Path, system: Any, *, legacy: bool = False) -> QuestionRules:
    """How a system's answers to a set are compared with those of the file `truth`: LaVIT's by its own rules."""
    lavit, lemmas = isinstance(system, Lavit), None
    if isinstance(system, Lavit) and LEMMATISED not in truth.stem:
        lemmas = system.lemmatizer = system.lemmatizer or Lemmatizer()
    return QuestionRules(lavit=lavit, exact=dataset == "gqa", answerable=dataset == "vizwiz", lemmas=lemmas,
                         legacy=legacy)


def find_truth(name: str, annotations: Path) -> Path | None:
    """The file of a set's ground truth by its name: as it is, then beside the annotations; the official file where the
    lemmatised one is not there. None: the annotations hold it themselves."""
    names = [name, name.replace(LEMMATISED, "")] if name else []
    places = [place for one in names for place in (Path(one), annotations.parent / Path(one).name)]
    return next((place for place in places if place.is_file()), None)
