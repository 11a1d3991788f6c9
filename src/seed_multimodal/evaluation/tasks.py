"""Table of benchmarks, and the evaluation of a system on one of them.

    task = TASKS["vqa"]["vizwiz"]
    run = Run(task, Path("val.json"), Path("outputs/vizwiz"), images=Path("vizwiz"))
    summary = evaluate(system, run, read_samples(run))

Samples are processed in batches, with the settings of the family's `FamilySpec.evaluation`.
"""

from __future__ import annotations

import hashlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation.annotations import Sample, read_captions, read_questions
from seed_multimodal.evaluation.answers import (
    LEMMATISED,
    Images,
    Line,
    Options,
    Run,
    Scores,
    Task,
    answer_samples,
    finish,
)
from seed_multimodal.evaluation.benchmarks import JUDGED
from seed_multimodal.evaluation.captions import Captions
from seed_multimodal.evaluation.choices import Choices, read_choices
from seed_multimodal.evaluation.drawing import Drawings
from seed_multimodal.evaluation.judged import JudgedDrawings
from seed_multimodal.evaluation.vqa import Questions
from seed_multimodal.models.registry import find_family
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.settings import nearest

TASKS: dict[str, dict[str, Task]] = {
    "vqa": {
        "vqav2": Task("vqa", "v2_mscoco_val2014_annotations_lemm.json"),
        "okvqa": Task("vqa", "mscoco_val2014_annotations_lemm.json"),
        "vizwiz": Task(
            "vqa", "vizwiz_val_annotations_lemm.json", first='Is the question: "{}" answerable?'
        ),
        "gqa": Task("vqa", exact=True),
    },
    "caption": {
        "coco": Task("caption", "data/coco_gt/coco_karpathy_test_gt.json"),
        "nocaps": Task("caption", "data/nocaps/nocaps_val_4500_captions.json"),
        "flickr": Task("caption", "data/flickr30k/flickr30k_test_gt.json"),
    },
    "text2image": {"coco": Task("text2image")},
    "choices": {"seedbench": Task("choices")},
    **{name: {name: Task(name)} for name in JUDGED},
}


class Evaluation(Protocol):
    """One kind of task with a system; made from the system, the run and its samples.

    Samples are of the class that `read_samples` returns for the task.
    """

    def answer(self, samples: Sequence[Any], images: Images) -> list[Line]:
        """The lines of a batch."""

    def score(self, samples: Sequence[Any], lines: Sequence[Line]) -> Scores:
        """Results in the benchmark's format, and scores, of samples with their lines."""


# The system is None if drawings of a folder are judged.
Evaluator = Callable[[Any, Run, Sequence[Any]], Evaluation]
Reader = Callable[[Path], Sequence[Sample]]
EVALUATIONS: dict[str, Evaluator] = {
    "vqa": Questions,
    "caption": Captions,
    "text2image": Drawings,
    "choices": Choices,
}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
PROBE: Options = {
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 0.5,
    "num_beams": 5,
    "max_new_tokens": 512,
    "seed": 42,
}


def find_task(kind: str, dataset: str) -> Task:
    """A row of `TASKS`. Raises ConfigError: an unknown data set."""
    rows = TASKS[kind]
    if dataset not in rows:
        raise ConfigError(
            f"The task {kind} has no dataset {dataset!r}{nearest(dataset, rows)}; "
            f"use {', '.join(rows)}."
        )
    return rows[dataset]


def find_truth(task: Task, annotations: Path) -> Path | None:
    """The ground-truth file of a task: at its path, else next to the annotations.

    The official file if the lemmatized one is missing. None: the annotations contain it.
    """
    if not task.truth:
        return None
    for name in (task.truth, task.truth.replace(LEMMATISED, "")):
        for file in (Path(name), annotations.parent / Path(name).name):
            if file.is_file():
                return file
    return None


def read_samples(run: Run) -> list[Sample]:
    """The samples of a run. Raises DataError: see the readers."""
    if run.task.is_judged:
        reader: Reader = pkgutil.resolve_name(JUDGED[run.task.kind].reader)
        return list(reader(run.annotations)[: run.limit])
    if run.task.kind == "vqa":
        return read_questions(run.annotations, run.truth)[: run.limit]
    if run.task.kind == "choices":
        return list(read_choices(run.annotations)[: run.limit])
    each_text = run.task.kind == "text2image"
    return read_captions(run.annotations, run.split, run.truth, each_text=each_text)[: run.limit]


def evaluate(
    system: MultimodalSystem | None, run: Run, samples: Sequence[Sample]
) -> JsonObject | None:
    """Evaluate a system (None: drawings of a folder), also under torchrun; the same call resumes.

    Returns the summary to the process that finishes last, else None.

    Raises:
        DataError, CheckpointError, ConfigError: missing or wrong files, weights or settings.
    """
    # 1. Prompts and settings; the caller's options override the family's.
    kind = run.task.kind
    evaluator: Evaluator
    if run.task.is_judged:
        evaluator = pkgutil.resolve_name(JUDGED[kind].evaluation)
    else:
        evaluator = EVALUATIONS[kind]
    if system is not None:
        if run.prompts == "plain":
            system.use_plain_prompts()
        family = find_family(system.config.system)
        settings_of = "text2image" if run.task.is_judged else kind
        run = replace(run, options={**family.evaluation.get(settings_of, {}), **run.options})
        if kind in family.evaluators:
            evaluator = pkgutil.resolve_name(family.evaluators[kind])

    # 2. Answers, of all processes together.
    evaluation = evaluator(system, run, samples)
    identity = _run_identity(system, run)
    if isinstance(evaluation, JudgedDrawings):
        lines = answer_samples(samples, evaluation.answer, run, identity, evaluation.is_current)
    else:
        lines = answer_samples(samples, evaluation.answer, run, identity)
    if lines is None:
        return None

    # 3. Scores.
    usable: list[Sample] = []
    usable_lines: list[Line] = []
    for sample, line in zip(samples, lines, strict=True):
        if not sample.problem:
            usable.append(sample)
            usable_lines.append(line)
    return finish(run, lines, evaluation.score(usable, usable_lines))


def _weight_states(paths: Iterable[object]) -> list[list[int]]:
    """Size and time of each file with weights at and below the paths among `paths`."""
    # Parts may share files.
    files: set[Path] = set()
    for path in paths:
        if not isinstance(path, Path):
            continue
        for file in [path] if path.is_file() else path.rglob("*"):
            if file.suffix in WEIGHT_SUFFIXES and file.is_file():
                files.add(file.resolve())
    return sorted([file.stat().st_size, file.stat().st_mtime_ns] for file in files)


def _run_identity(system: MultimodalSystem | None, run: Run) -> JsonObject:
    """What determines the answers: settings, annotations, weights (size and time of each file)."""
    # 1. The samples, and how they are answered and judged.
    annotations = run.annotations.read_bytes() if run.annotations.is_file() else b""
    identity: JsonObject = {
        "task": {
            "kind": run.task.kind,
            "truth": run.task.truth,
            "exact": run.task.exact,
            "first": run.task.first,
        },
        "prompts": run.prompts,
        "options": run.options,
        "seed": run.seed,
        "best_of": run.best_of,
        "clip": str(run.clip),
        "clip_weights": _weight_states([run.clip]),
        "annotations": hashlib.sha256(annotations).hexdigest(),
    }
    if run.judging is not None:
        judging = asdict(replace(run.judging, device=""))
        identity["judging"] = {name: value and str(value) for name, value in judging.items()}
        identity["judge"] = _weight_states([Path(run.judging.model)])
    if system is None:
        return identity

    # 2. The system.
    return identity | {
        "model": system.config.name,
        "dtype": system.dtype_name,
        "quantization": str(getattr(system.llm, "quantization_method", None)),
        "transform": repr(getattr(system.images, "transform", None)),
        "weights": _weight_states(vars(system.config).values()),
    }
