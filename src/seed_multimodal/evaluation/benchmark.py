"""Evaluation of a system on a benchmark: settings, samples, answers, scores.

    benchmark = open_benchmark("vqa", file=Path("val.json"), out=Path("outputs"), dataset="vizwiz")
    summary = run(benchmark, load_system)

OUT/settings.json      what determines the answers; a run with other settings is refused
OUT/samples-0.jsonl    one line per sample, appended by process 0 (-1 by process 1, …)
OUT/results.json       in the benchmark's format, and summary.json: written when all samples are
                       answered

A benchmark is a dataclass derived from `Benchmark`, in `BENCHMARKS` or registered by an entry point
of the group `seed_multimodal.benchmarks`: `seed eval` gets a command of its name, whose flags are
the fields with a help text. Modules import torch where they use it, so that `seed eval --help` is
fast.

Processes (torchrun's RANK and WORLD_SIZE) share the samples; their number may change on resume.
Unusable samples are logged, counted and retried by the next run; `max_bad` consecutive ones stop
the run.
"""

from __future__ import annotations

import hashlib
import json
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from PIL import Image

from seed_multimodal.config import read_table
from seed_multimodal.data.formats.bad_records import BROKEN, BadRecords, RecordNote
from seed_multimodal.data.formats.storage import is_remote, read_all
from seed_multimodal.disk import JsonObject, folder_lock, replace_text, writing
from seed_multimodal.entry import log_line, rank_and_world_size
from seed_multimodal.errors import (
    ConfigError,
    DataError,
    GenerationError,
    ImageError,
    pluralize,
)
from seed_multimodal.evaluation.annotations import Key, Sample, sample_image
from seed_multimodal.evaluation.metrics import finite_json, plain
from seed_multimodal.images.io import open_image
from seed_multimodal.models.registry import find_family
from seed_multimodal.plugins import import_entry, registered
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_identity, find_entry, positive, read_settings, setting
from seed_multimodal.weights.catalogue import weight_files

if TYPE_CHECKING:
    from seed_multimodal.pipelines.base import MultimodalSystem

# The command of `seed eval` → its class.
BENCHMARKS: dict[str, str] = read_table(__file__)["benchmarks"]
Line = JsonObject  # of a file of answers: a sample's id, and its answer or why there is none (bad)
Images = Sequence[Image.Image | None]  # None: a caption without image


@dataclass(kw_only=True)
class EvaluationSettings:
    """Settings of a benchmark and of the suite; those with a help text are flags.

    Those that determine no answer (places, amounts, what only scores depend on) `may_change` when a
    run resumes, also where a subclass declares them again.

    Attributes:
        options: of the system's methods, which override the family's.
        seed: of texts, and of the first image; image n has seed + n.
        device: of a model that judges.
    """

    out: Path = setting(may_change=True)
    options: JsonObject = field(default_factory=dict)
    seed: int = 42
    batch_size: int = positive(16, may_change=True)
    device: str = setting("auto", may_change=True)
    limit: int | None = positive(
        None, may_change=True, help="the first N samples only", metavar="N"
    )
    max_bad: int = positive(
        20, may_change=True, help="end after so many bad samples in a row", flag="--max_bad"
    )


@dataclass(frozen=True)
class Scores:
    """Scores of an evaluation, with the results that they are computed from.

    Attributes:
        results: in the format of the benchmark's program.
        values: name → score or `Estimate`, or type of sample → score.
        notes: logged and kept in the summary.
    """

    results: list[JsonObject]
    values: JsonObject
    notes: list[str] = field(default_factory=list)


SampleT = TypeVar("SampleT", bound=Sample)


@dataclass(kw_only=True)
class Benchmark(EvaluationSettings, Generic[SampleT]):
    """A benchmark, whose fields are its settings; `run` calls its methods in the order below, of a
    family's evaluator, too.

    Attributes:
        title: help of its command.
        kind: in the suite, and of `FamilySpec.evaluators`.
        options_of: key of `FamilySpec.evaluation`.
        draws: whether the system draws.
        file: of the samples, or its URL.
        truth: file of reference answers or captions.
    """

    title: ClassVar[str]
    kind: ClassVar[str]
    options_of: ClassVar[str]
    draws = False

    file: str | Path = setting(may_change=True)  # its contents count
    truth: str | Path | None = setting(None, may_change=True)
    images: str | Path | None = setting(
        None, may_change=True, help="folder of the images", metavar="DIR"
    )
    prompts: str = setting(
        "chat", choices=("chat", "plain"), help="plain: of pretrained SEED-LLaMA"
    )

    def samples(self) -> Sequence[SampleT]:
        """All samples. Raises DataError: no such file, or another layout."""
        raise NotImplementedError

    def use(self, system: MultimodalSystem) -> None:
        """Set the system that answers."""
        self.system = system

    def prepare(self, samples: Sequence[SampleT]) -> None:
        """Load what answers need besides `self.system`."""

    def is_current(self, sample: SampleT, line: Line) -> bool:
        """Whether an earlier answer still counts, as far as that is not known from `made_from`."""
        return True

    def answer(self, samples: Sequence[SampleT], images: Images) -> list[Line]:
        """The lines of a batch, without ids."""
        raise NotImplementedError

    def score(self, samples: Sequence[SampleT], lines: Sequence[Line]) -> Scores:
        """Results in the benchmark's format, and scores, of samples (at least one) and lines."""
        raise NotImplementedError

    # ---- for subclasses

    def text_options(self) -> JsonObject:
        """Keywords of the methods that answer in text."""
        return {"seed": self.seed, "batch_size": self.batch_size, **self.options}

    def draw(self, samples: Sequence[SampleT], num_images: int) -> list[list[Image.Image]]:
        """`num_images` drawings of each sample's caption; seeds count those of all samples."""
        options = {**self.options, "batch_size": self.batch_size}
        if self.prompts == "plain":
            options["verbatim"] = True
        captions = [sample.caption for sample in samples]
        seeds = [self.seed + num_images * sample.index for sample in samples]
        drawings = self.system.draw(
            captions, seeds, num_images=num_images, read_back=False, **options
        )
        starts = range(0, len(drawings), num_images)
        return [drawings[start : start + num_images] for start in starts]

    def cut(self, text: str) -> str:
        """The answer; with plain prompts its first line.

        The pretrained model continues with another question.
        """
        if self.prompts == "plain":
            text = text.partition("\n")[0]
        return text.strip()

    def open_image(self, sample: Sample) -> Image.Image | None:
        """The image of a sample, or None. Raises ImageError: unusable."""
        if sample.problem:
            raise ImageError(sample.problem)
        if sample.image is None:
            return None
        try:
            image = sample_image(sample, self.images, self.file)
        except DataError as error:
            raise ImageError(str(error)) from error
        return open_image(image, name=None if isinstance(image, Path) else sample.location).image

    def made_from(self, sample: SampleT) -> str:
        """Digest of what the answer is made from: texts, seed, and the image (of a file its size
        and time; one in a tar or table is read, once in a run)."""
        if sample.made_from:
            return sample.made_from
        texts = [sample.question, *getattr(sample, "choices", ())]
        if self.truth is None:
            texts += sample.references
        image: object = None
        try:
            if sample.image is not None:
                image = sample_image(sample, self.images, self.file)
            if isinstance(image, Path):
                state = image.stat()
                image = [state.st_size, state.st_mtime_ns]
            else:  # a URL is not read
                image = _digest(image) if isinstance(image, bytes) else str(sample.image)
        except (DataError, ImageError, OSError) as error:
            image = type(error).__name__
        sample.made_from = _digest(repr([texts, sample.index, image]).encode())
        return sample.made_from


AnyBenchmark = Benchmark[Any]


def benchmark_class(command: str) -> type[AnyBenchmark]:
    """The class of a command of `seed eval`. Raises ConfigError: none, or it cannot be imported."""
    if command in BENCHMARKS:
        return pkgutil.resolve_name(BENCHMARKS[command])
    entry = find_entry(registered("benchmarks"), command, "benchmark")
    kind = import_entry(entry)
    if not (isinstance(kind, type) and issubclass(kind, Benchmark)):
        raise ConfigError(
            f"{entry.value}: benchmark {command} is no evaluation.benchmark.Benchmark."
        )
    for name in ("title", "kind", "options_of"):
        if not isinstance(getattr(kind, name, None), str):
            raise ConfigError(f"{entry.value}: benchmark {command} has no {name}.")
    return kind


def open_benchmark(command: str, **settings: object) -> AnyBenchmark:
    """A benchmark with these settings. Raises ConfigError: a wrong value."""
    return read_settings(benchmark_class(command), settings, command)


# ---- a run


def run(benchmark: AnyBenchmark, load: Callable[[], MultimodalSystem | None]) -> JsonObject | None:
    """Evaluate a system, also under torchrun; the same call resumes.

    benchmark: its `options` get the family's.
    load: called after the samples were read; None: drawings of a folder are judged.

    Returns the summary to the process that finishes last, else None.

    Raises:
        DataError: the folder belongs to another run, a process with this rank is running, disk
            error, `max_bad` consecutive unusable samples, or a score that is not finite.
        CheckpointError, ConfigError: missing or wrong files, weights or settings.
    """
    # 1. The samples, then the system with its family's settings.
    samples = _read_samples(benchmark)
    system = load()
    if system is not None:
        if benchmark.prompts == "plain":
            system.use_plain_prompts()
        family = find_family(system.config.system)
        options = {**family.evaluation.get(benchmark.options_of, {}), **benchmark.options}
        if benchmark.kind in family.evaluators:
            evaluator = pkgutil.resolve_name(family.evaluators[benchmark.kind])
            # A benchmark of another package keeps its own rules.
            if issubclass(evaluator, type(benchmark)):
                benchmark = evaluator(**_settings(benchmark))
                samples = _read_samples(benchmark)
        benchmark.options = options
        benchmark.use(system)

    # 2. Answers, of all processes together.
    identity = _identity(benchmark, system)
    check_identity(benchmark.out, identity, "--out", begin=False)
    benchmark.prepare(samples)
    check_identity(benchmark.out, identity, "--out")
    lines = _answer_share(benchmark, samples)
    if any(sample.key not in lines for sample in samples):
        log_line(
            f"{benchmark.out}: this share is finished; other processes still work or have to be "
            "run."
        )
        return None

    # 3. Scores.
    usable = [sample for sample in samples if not sample.problem]
    usable_lines = [lines[sample.key] for sample in usable]
    finite_json(usable_lines, str(benchmark.out))
    scores = benchmark.score(usable, usable_lines) if usable else Scores([], {})
    return _write_summary(benchmark.out, [lines[sample.key] for sample in samples], scores)


def _read_samples(benchmark: AnyBenchmark) -> Sequence[Sample]:
    samples: Sequence[Sample] = benchmark.samples()[: benchmark.limit]
    for index, sample in enumerate(samples):
        sample.index = index
    return samples


def _write_summary(out: Path, lines: Sequence[Line], scores: Scores) -> JsonObject:
    """Write results.json and summary.json: counts, the first bad samples, scores and notes."""
    bad = [line["bad"] for line in lines if "bad" in line]
    summary: JsonObject = {
        "samples": len(lines),
        "answered": len(lines) - len(bad),
        "bad": len(bad),
        "bad_first": bad[:5],
        **scores.values,
    }
    summary = plain(summary)
    if scores.notes:
        summary["notes"] = scores.notes
    with writing(out, DataError):
        replace_text(out / "results.json", finite_json(scores.results, str(out)))
        replace_text(out / "summary.json", finite_json(summary, str(out), indent=1) + "\n")
    for note in scores.notes:
        log_line(note)
    return summary


# ---- answers


def _answer_share(benchmark: AnyBenchmark, samples: Sequence[Sample]) -> dict[Key, Line]:
    """Answer this process's unanswered samples; returns the lines of all processes."""
    folder = benchmark.out
    rank, world_size = rank_and_world_size()
    file = folder / f"samples-{rank}.jsonl"
    share = samples[rank::world_size]
    lock_name = f".{file.name}.lock"
    with folder_lock(folder, DataError, "answering with this rank", name=lock_name):
        # Samples that failed are tried again.
        lines = _read_lines(benchmark, samples)
        todo = [sample for sample in share if "bad" in lines.get(sample.key, {"bad": ""})]
        n_answered = len(share) - len(todo)
        if n_answered:
            log_line(
                f"{folder}: {n_answered:,} of {pluralize(len(share), 'sample')} have been answered "
                "before."
            )
        with Progress("evaluation", len(share), "sample", start=n_answered) as bar:
            _append_answers(benchmark, todo, file, bar)
        return _read_lines(benchmark, samples)


def _append_answers(
    benchmark: AnyBenchmark, samples: Sequence[Sample], file: Path, bar: Progress
) -> None:
    """Answer in batches, each of which is appended to `file`."""
    batch_size = benchmark.batch_size
    bad = BadRecords(benchmark.max_bad, bar.write_line, "skipped: ")
    for start in range(0, len(samples), batch_size):
        # 1. The lines. A line break comes first, since the last line may be incomplete.
        lines = _answered(benchmark, samples[start : start + batch_size])
        text = "".join("\n" + finite_json(line, str(file)) for line in lines)
        with (
            writing(file, DataError),
            open(file, "a", encoding="utf-8", errors="backslashreplace") as opened,
        ):
            opened.write(text)
        bar.update(len(lines))

        # 2. Unusable samples in a row are a wrong folder or file.
        for line in lines:
            if "bad" in line:
                bad.add(RecordNote(BROKEN, "broken record", line["bad"]))
            else:
                bad.in_a_row = 0


def _answered(benchmark: AnyBenchmark, batch: Sequence[Sample]) -> list[Line]:
    """The lines of a batch; one that fails is answered one by one."""
    try:
        images = [benchmark.open_image(sample) for sample in batch]
        lines = benchmark.answer(batch, images)
    except (GenerationError, ImageError) as error:
        if len(batch) > 1:
            return [line for sample in batch for line in _answered(benchmark, [sample])]
        [sample] = batch
        message = str(error)
        if sample.location not in message:
            message = f"{sample.location}: {message}"
        return [{"id": sample.key, "bad": message}]
    return [
        {"id": sample.key, "made_from": benchmark.made_from(sample), **line}
        for sample, line in zip(batch, lines, strict=True)
    ]


def _read_lines(benchmark: AnyBenchmark, samples: Sequence[Sample]) -> dict[Key, Line]:
    """Each sample's line: the current answer, else the latest error."""
    by_key = {sample.key: sample for sample in samples if not sample.problem}
    lines: dict[Key, Line] = {}
    for path in sorted(benchmark.out.glob("samples-*.jsonl")):
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                line = json.loads(text)
            except ValueError:  # blank or incomplete
                continue
            if not (isinstance(line, dict) and isinstance(line.get("id"), str | int)):
                continue
            # An error does not replace an answer. A larger --limit had further samples.
            key = line["id"]
            if "bad" in line:
                counts = "bad" in lines.get(key, line)
            else:
                sample = by_key.get(key)
                counts = sample is not None and benchmark.is_current(sample, line)
                if counts and "made_from" in line:
                    counts = line["made_from"] == benchmark.made_from(sample)
            if counts:
                lines[key] = line
    return lines


# ---- what determines the answers


def _settings(benchmark: AnyBenchmark) -> JsonObject:
    return {item.name: getattr(benchmark, item.name) for item in fields(benchmark)}


def _identity(benchmark: AnyBenchmark, system: MultimodalSystem | None) -> JsonObject:
    """Settings, samples, and the weights (size and time of each file)."""
    # 1. The settings, and the contents of the files that they name.
    file = benchmark.file
    content = read_all(file) if is_remote(file) or Path(file).is_file() else b""
    values = _settings(benchmark)
    for kind in type(benchmark).__mro__:
        for name, item in getattr(kind, "__dataclass_fields__", {}).items():
            if item.metadata.get("may_change"):
                values.pop(name, None)
    identity = {**values, "contents of the file of samples": _digest(content)}
    models: list[object] = list(values.values())

    # 2. The system.
    if system is not None:
        models += vars(system.config).values()
        identity |= {
            "model": system.config.name,
            "dtype": system.dtype_name,
            "quantization": str(getattr(system.llm, "quantization_method", None)),
            "transform": repr(getattr(system.images, "transform", None)),
            "settings of the model": _digest(repr(_values_of(system)).encode()),
        }
    states = str(_weight_states(models)).encode()
    return {**identity, "size and time of weights": _digest(states)}


def _values_of(system: MultimodalSystem) -> list[tuple[str, object]]:
    """The settings of a system, of which paths may change."""
    values = vars(system.config).items()
    return [(name, value) for name, value in values if not isinstance(value, Path)]


def _weight_states(paths: Sequence[object]) -> list[list[int]]:
    """Size and time of each file with weights at and below the paths among `paths`."""
    # Parts may share files.
    files: set[Path] = set()
    for path in paths:
        if isinstance(path, Path):
            files.update(file.resolve() for file in weight_files(path))
    states = [file.stat() for file in files if file.is_file()]
    return sorted([state.st_size, state.st_mtime_ns] for state in states)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
