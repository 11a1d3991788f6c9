"""Answers to many samples by any number of processes, appended to files for resuming.

OUT/settings.json      settings of the answers; other settings raise an error
OUT/samples-0.jsonl    one line per sample, appended by process 0 (-1 by process 1, …)
OUT/results.json       in the benchmark's format, and summary.json: written when all samples are
                       answered

Processes (torchrun's RANK and WORLD_SIZE) work on samples[rank::world]; their number may change on
resume. Unusable samples are logged, counted and retried by the next run; `max_bad` consecutive ones
stop the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image

from seed_multimodal.disk import JsonObject, folder_lock, read_json_object, replace_text, writing
from seed_multimodal.entry import log_line
from seed_multimodal.errors import DataError, GenerationError, ImageError, pluralize
from seed_multimodal.evaluation.annotations import Key, Sample, find_image_file
from seed_multimodal.evaluation.benchmarks import JUDGED
from seed_multimodal.images.io import open_image
from seed_multimodal.progress import Progress
from seed_multimodal.settings import changed_settings, check_settings, setting
from seed_multimodal.training.distributed import rank_and_world_size

LEMMATISED = "_lemm"  # suffix of ground-truth files lemmatized by LaVIT's authors
# Settings whose values are digests or long: their names in messages.
NO_VALUES = {
    "task": "the benchmark",
    "annotations": "the contents of the file of samples",
    "weights": "the weights",
    "transform": "the image preprocessing",
}
Options = Mapping[str, Any]  # settings of generation and of the de-tokenizer, by name
Images = Sequence[Image.Image | None]  # None: a caption without image


class Line(TypedDict, total=False):
    """A line of a file of answers: the answer to a sample, or why there is none."""

    id: Key
    bad: str  # why the sample could not be used
    answerable: str  # "vqa": the reply to `Task.first`
    answer: str  # "vqa"; "choices": a letter
    log_likelihoods: list[float]  # "choices": of a token of each choice, in the mean
    caption: str  # "caption": the answer; "text2image": the text
    image: str  # "text2image": the file's name
    clip: float  # "text2image": cosine of image and text
    clip_image: float  # "text2image": cosine of image and captioned image
    files: list[tuple[str, int, int]]  # judged: name, size, time of the images of a folder
    detections: list[list[JsonObject]]  # "geneval": of each image, see `detection.Detection`
    probabilities: list[list[float]]  # "geneval2", "dpg": of each image, of each right answer


# Samples and their images → a line for each.
Answer = Callable[[Sequence[Sample], Images], Sequence[Line]]


@dataclass(frozen=True)
class Scores:
    """Scores of an evaluation, with the results that they are computed from.

    Attributes:
        results: in the format of the benchmark's program.
        values: name → score, or type of sample → score.
        notes: logged and kept in the summary.
    """

    results: list[JsonObject]
    values: JsonObject
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        kind: of `tasks.EVALUATIONS`, or of `benchmarks.JUDGED`.
        truth: LaVIT's ground-truth file, see `tasks.find_truth`.
        exact: an answer is right if it equals the single reference, instead of agreement with ten
            annotators.
        first: preliminary question; a "no" makes the answer "unanswerable".
    """

    kind: str
    truth: str = ""
    exact: bool = False
    first: str = ""

    @property
    def is_judged(self) -> bool:
        """Whether another model judges drawings."""
        return self.kind in JUDGED


@dataclass(frozen=True)
class Judging:
    """How drawings are judged.

    Attributes:
        model: the detector (see `detection.load_detector`), or what answers questions.
        image_folder: of drawings; None: the system draws them.
        threshold, counting_threshold, max_overlap: see `detection.Limits`; None: the detector's.
        device: of the judge.
    """

    model: str
    image_folder: Path | None = None
    threshold: float | None = setting(None, minimum=0, maximum=1)
    counting_threshold: float | None = setting(None, minimum=0, maximum=1)
    max_overlap: float | None = setting(None, minimum=0, maximum=1)
    device: str = "auto"

    def __post_init__(self) -> None:
        check_settings(self, "judging")


@dataclass(frozen=True)
class Run:
    """An evaluation.

    Attributes:
        annotations: questions, images to caption or captions to generate from.
        out: folder of the results.
        images: folder of the images (None: next to `annotations`).
        truth: file of reference answers or captions.
        split: of Karpathy's file.
        limit: only the first samples.
        batch: batch size.
        max_bad: consecutive unusable samples that stop the run.
        prompts: "chat" or "plain", see `MultimodalSystem.use_plain_prompts`.
        options: of the batch methods, override the system's.
        seed: of the first image; image n has seed + n.
        best_of: drawings per caption: ranked by `clip`, or judged.
        inception, resolution: see `drawing.fid`.
        original: .jpg files as by the original script, with negative conditioning on SEED-LLaMA's
            captionless image.
        judging: of drawings.
    """

    task: Task
    annotations: Path
    out: Path
    images: Path | None = None
    truth: Path | None = None
    split: str = "test"
    limit: int | None = None
    batch: int = 16
    max_bad: int = 20
    prompts: str = "chat"
    options: Options = field(default_factory=dict)
    seed: int = 0
    best_of: int = 1
    clip: Path | None = None
    inception: Path | None = None
    resolution: int = 512
    original: bool = False
    judging: Judging | None = None

    def cut(self, text: str) -> str:
        """The answer; with plain prompts its first line.

        The pretrained model continues with another question.
        """
        if self.prompts == "plain":
            text = text.partition("\n")[0]
        return text.strip()


def answer_samples(
    samples: Sequence[Sample],
    answer: Answer,
    run: Run,
    settings: JsonObject,
    is_current: Callable[[Line], bool] = lambda line: True,
) -> list[Line] | None:
    """Answer this process's unanswered samples.

    is_current: whether an earlier answer still counts, because what it was made from is the same.

    Returns all lines to the process that finishes last, else None.

    Raises:
        DataError: the folder belongs to another run, a process with this rank is running, disk
            error, or `max_bad` consecutive unusable samples.
    """
    # 1. This process's samples and file.
    folder = run.out
    rank, world_size = rank_and_world_size()
    _check_settings(folder, settings)
    file = folder / f"samples-{rank}.jsonl"
    share = samples[rank::world_size]

    # 2. Their answers.
    lock_name = f".{file.name}.lock"
    with folder_lock(folder, DataError, "answering with this rank", name=lock_name):
        # Samples that failed are tried again.
        lines = read_lines(folder, is_current)
        todo = [sample for sample in share if "bad" in lines.get(sample.key, {"bad": ""})]
        n_answered = len(share) - len(todo)
        if n_answered:
            log_line(
                f"{folder}: {n_answered:,} of {pluralize(len(share), 'sample')} have been answered "
                "before."
            )
        _answer_and_append(todo, answer, run, file, n_answered)
        lines = read_lines(folder, is_current)

    # 3. The lines of all processes.
    if any(sample.key not in lines for sample in samples):
        log_line(f"{folder}: this share is finished; other processes still work or have to be run.")
        return None
    return [lines[sample.key] for sample in samples]


def _answer_and_append(
    samples: Sequence[Sample], answer: Answer, run: Run, file: Path, n_answered: int
) -> None:
    """Answer in batches, each of which is appended to `file`; `n_answered`: before, for the bar."""
    bad_in_a_row = 0
    total = n_answered + len(samples)
    with Progress("evaluation", total, "sample", start=n_answered) as bar:
        for start in range(0, len(samples), run.batch):
            batch = samples[start : start + run.batch]
            lines = _answered(batch, answer, run)
            # 1. Their lines. A line break comes first, since the last line may be incomplete.
            text = "".join("\n" + json.dumps(line, ensure_ascii=False) for line in lines)
            with (
                writing(file, DataError),
                open(file, "a", encoding="utf-8", errors="backslashreplace") as opened,
            ):
                opened.write(text)
            bar.update(len(batch))

            # 2. Unusable samples in a row are a wrong folder or file.
            for line in lines:
                if "bad" not in line:
                    bad_in_a_row = 0
                    continue
                bad_in_a_row += 1
                bar.write_line(f"skipped: {line['bad']}")
                if bad_in_a_row >= run.max_bad:
                    raise DataError(
                        f"{bad_in_a_row} samples in a row cannot be used, the last: {line['bad']}"
                    )


def open_sample(sample: Sample, run: Run) -> Image.Image | None:
    """The image of a sample, or None. Raises DataError, ImageError: unusable."""
    if sample.problem:
        raise DataError(sample.problem)
    if sample.image is None:
        return None
    file = find_image_file(sample.image, run.images, run.annotations, sample.location)
    return open_image(file).image


def finish(run: Run, lines: Sequence[Line], scores: Scores) -> JsonObject:
    """Write results and summary.json.

    Returns the summary: counts, the first bad samples, scores and notes.
    """
    # 1. The summary.
    bad = [line["bad"] for line in lines if "bad" in line]
    summary: JsonObject = {
        "samples": len(lines),
        "answered": len(lines) - len(bad),
        "bad": len(bad),
        "bad_first": bad[:5],
        **scores.values,
    }
    if scores.notes:
        summary["notes"] = scores.notes

    # 2. The files.
    with writing(run.out, DataError):
        replace_text(run.out / "results.json", json.dumps(scores.results, ensure_ascii=False))
        replace_text(
            run.out / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1) + "\n"
        )
    for note in scores.notes:
        log_line(note)
    return summary


def read_lines(folder: Path, is_current: Callable[[Line], bool]) -> dict[Key, Line]:
    """Each sample's line: the current answer, else the latest error."""
    lines: dict[Key, Line] = {}
    for path in sorted(folder.glob("samples-*.jsonl")):
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                line = json.loads(text)
            except ValueError:  # blank or incomplete
                continue
            # An error does not replace an answer.
            if "bad" in line:
                if "bad" in lines.get(line["id"], line):
                    lines[line["id"]] = line
            elif is_current(line):
                lines[line["id"]] = line
    return lines


def _answered(batch: Sequence[Sample], answer: Answer, run: Run) -> list[Line]:
    """The lines of a batch, in its order."""
    # 1. The images; those that cannot be opened do not fail the others.
    lines: dict[Key, Line] = {}
    usable: list[Sample] = []
    images: list[Image.Image | None] = []
    for sample in batch:
        try:
            images.append(open_sample(sample, run))
            usable.append(sample)
        except (DataError, ImageError) as error:
            lines[sample.key] = {"id": sample.key, "bad": str(error)}

    # 2. The answers.
    for line in _lines(usable, images, answer):
        lines[line["id"]] = line
    return [lines[sample.key] for sample in batch]


def _lines(samples: Sequence[Sample], images: Images, answer: Answer) -> Iterator[Line]:
    """The lines of samples with their images; a batch that fails is answered one by one."""
    if not samples:
        return
    try:
        lines = answer(samples, images)
    except (GenerationError, ImageError) as error:
        if len(samples) == 1:
            yield {"id": samples[0].key, "bad": f"{samples[0].location}: {error}"}
            return
        for sample, image in zip(samples, images, strict=True):
            yield from _lines([sample], [image], answer)
        return
    for sample, line in zip(samples, lines, strict=True):
        yield {"id": sample.key, **line}


def _check_settings(folder: Path, settings: JsonObject) -> None:
    """Write the folder's settings, or raise DataError if they changed."""
    # The first process writes them, all compare.
    file = folder / "settings.json"
    as_json = json.loads(json.dumps(settings))
    with folder_lock(folder, DataError, timeout=-1), writing(file, DataError):
        if not file.exists():
            replace_text(file, json.dumps(as_json, indent=1, ensure_ascii=False))
    changes = changed_settings(read_json_object(file, DataError), as_json)
    if changes:
        changes = list(dict.fromkeys(map(_describe_change, changes)))
        raise DataError(
            f"{folder}: was started with other settings ({'; '.join(changes)}); use another --out "
            "or the same settings."
        )


def _describe_change(change: str) -> str:
    """A change from `changed_settings`, without digests and internal names."""
    key, _, values = change.partition(": ")
    label = NO_VALUES.get(key.partition(".")[0])
    return label or f"{key.removeprefix('options.').replace('_', ' ')}: {values}"
