"""The benchmarks, as rows of one table, and the settings of a run on one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest

LEMMATISED = "_lemm"  # in the names of ground-truth files that LaVIT's authors have lemmatised


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        truth: LaVIT's ground-truth file: this path, else its name beside the annotations.
        exact: an answer is right if it equals the one right answer, instead of agreement with ten annotators.
        first: is asked before each question; a "no" makes the answer "unanswerable".
    """

    truth: str = ""
    exact: bool = False
    first: str = ""


TASKS: dict[str, dict[str, Task]] = {
    "vqa": {
        "vqav2": Task("v2_mscoco_val2014_annotations_lemm.json"), "okvqa": Task("mscoco_val2014_annotations_lemm.json"),
        "vizwiz": Task("vizwiz_val_annotations_lemm.json", first='Is the question: "{}" answerable?'),
        "gqa": Task(exact=True)},
    "caption": {
        "coco": Task("data/coco_gt/coco_karpathy_test_gt.json"),
        "nocaps": Task("data/nocaps/nocaps_val_4500_captions.json"),
        "flickr": Task("data/flickr30k/flickr30k_test_gt.json")},
    "text2image": {"coco": Task()}}

# Generation of the original SEED-LLaMA scripts ("vqa" is ours: the script asked one question, see PROBE).
SEED_LLAMA: dict[str, dict[str, Any]] = {
    "vqa": {"do_sample": False, "num_beams": 1, "max_new_tokens": 16},
    "caption": {"do_sample": False, "num_beams": 5, "max_new_tokens": 120},
    "text2image": {"do_sample": False, "num_beams": 4, "max_new_tokens": 120, "guidance_scale": 5.0}}
PROBE = {"do_sample": True, "temperature": 1.0, "top_p": 0.5, "num_beams": 5, "max_new_tokens": 512, "seed": 42}
LAVIT_DRAWING = {"top_k": 300, "top_p": 1.0, "guidance": 1.5, "guidance_scale": 1.5, "num_inference_steps": 50}


@dataclass(frozen=True)
class Run:
    """An evaluation.

    Attributes:
        task, dataset: of `TASKS`. annotations: questions, images to describe or captions to draw. out: folder.
        images: folder of the images (None: beside `annotations`). truth: file of answers or captions to compare with.
        split: of Karpathy's file. limit: the first samples only. batch: samples at a time. max_bad: see `answers`.
        results: name of the file of results. prompts: "chat" or "plain" (of the pretrained SEED-LLaMA).
        caption_prompt: request for captions; of plain prompts their first words.
        options: of the batch methods, over the system's own. seed: of the first drawing; number n has seed + n.
        best_of: drawings per caption, chosen by `clip`. inception, resolution: see `fid`. kind: of image files.
        unconditional: SEED-LLaMA's drawings are steered away from what it draws without a caption.
    """

    task: str
    dataset: str
    annotations: Path
    out: Path
    images: Path | None = None
    truth: Path | None = None
    split: str = "test"
    limit: int | None = None
    batch: int = 16
    max_bad: int = 20
    results: str = "results"
    prompts: str = "chat"
    caption_prompt: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    best_of: int = 1
    clip: Path | None = None
    inception: Path | None = None
    resolution: int = 512
    kind: str = "png"
    unconditional: bool = False

    def __post_init__(self) -> None:
        if self.dataset not in TASKS[self.task]:
            raise ConfigError(f"The task {self.task} has no dataset {self.dataset!r}"
                              f"{nearest(self.dataset, TASKS[self.task])}; use {', '.join(TASKS[self.task])}.")

    def cut(self, text: str) -> str:
        """An answer; of plain prompts its first line, since the pretrained model continues with another question."""
        return (text.partition("\n")[0] if self.prompts == "plain" else text).strip()

    @property
    def row(self) -> Task:
        """Of `TASKS`."""
        return TASKS[self.task][self.dataset]


def find_truth(row: Task, annotations: Path) -> Path | None:
    """The ground-truth file of a row: by its path, then beside the annotations; the official file where the lemmatised
    one is missing. None: the annotations hold it themselves."""
    names = [row.truth, row.truth.replace(LEMMATISED, "")] if row.truth else []
    places = [place for one in names for place in (Path(one), annotations.parent / Path(one).name)]
    return next((place for place in places if place.is_file()), None)
