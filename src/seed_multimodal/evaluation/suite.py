"""The papers' tables: every benchmark whose files are there, with the published figures.

The rows are in `suite.yaml`. Runs that several rows share are done once; each has a folder of its
own and resumes; only the tokenizer is measured again. What cannot run (files or weights are
missing) is a row with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from seed_multimodal.disk import JsonObject, replace_text, writing
from seed_multimodal.entry import log_line
from seed_multimodal.errors import CheckpointError, ConfigError, DataError, first_line
from seed_multimodal.evaluation.answers import Run
from seed_multimodal.evaluation.benchmarks import JUDGED
from seed_multimodal.evaluation.tasks import evaluate, find_task, read_samples
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.settings import read_settings

ROWS = Path(__file__).with_name("suite.yaml")
TOKENIZER = "tokenizer"
DRAWN = "text2image"
CLIP_KINDS = (DRAWN, "geneval")  # which read `Run.clip`
RESULTS = "suite.json"
NOT_RUN = "not run"


@dataclass(frozen=True)
class SuiteRow:
    """A figure of a table; fields: see `suite.yaml`."""

    name: str
    kind: str
    file: str
    metric: str
    dataset: str = ""
    truth: str = ""
    images: str = ""
    scale: float = 1.0
    needs: str = ""
    published: Mapping[str, tuple[float, str]] = field(default_factory=dict)

    @property
    def run_name(self) -> str:
        """Rows of one run have the same."""
        return "_".join([self.kind, *Path(self.file).with_suffix("").parts])


@dataclass(frozen=True)
class SuiteResult:
    """A row's figure, or why there is none (`reason`); `bad`: samples that could not be used."""

    row: SuiteRow
    value: float | None
    samples: int = 0
    bad: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Suite:
    """The models that run the rows.

    model: name of the system. load: the system, which is loaded for the first row that needs it.
    measure_tokenizer: a row and its folder → the report.
    run: settings of all runs; `judging` only of drawings that are judged.
    """

    model: str
    data: Path
    load: Callable[[], MultimodalSystem]
    measure_tokenizer: Callable[[SuiteRow, Path], JsonObject]
    run: Run


def read_suite(path: Path = ROWS) -> list[SuiteRow]:
    """The rows of a table. Raises ConfigError: a row of another form."""
    rows: list[SuiteRow] = []
    for index, values in enumerate(yaml.safe_load(path.read_text(encoding="utf-8"))):
        row: SuiteRow = read_settings(SuiteRow, dict(values), f"{path}: row {index}")
        rows.append(row)
    return rows


def run_suite(
    suite: Suite, rows: Sequence[SuiteRow], only: Sequence[str] | None = None
) -> list[SuiteResult]:
    """Run the rows in their order, in one process.

    only: kinds that are run; figures of others are those of an earlier call. None: all.
    """
    outcomes: dict[str, JsonObject | str] = {}  # of a run: its summary, or the reason
    results: list[SuiteResult] = []
    systems: list[MultimodalSystem] = []
    earlier = _earlier_entries(suite) if only else {}
    for row in rows:
        if only and row.kind not in only:
            results.append(_earlier_result(row, earlier.get(row.name)))
            continue
        if row.run_name not in outcomes:
            log_line(f"{row.name}: {row.kind} on {suite.data / row.file}")
            outcomes[row.run_name] = _outcome(suite, row, systems)
        outcome = outcomes[row.run_name]
        results.append(_result(row, outcome))
    return results


def _outcome(suite: Suite, row: SuiteRow, systems: list[MultimodalSystem]) -> JsonObject | str:
    """The summary of a run, or why there is none; the first system is kept in `systems`."""
    # 1. Its files.
    for name in (row.file, row.truth):
        if not (suite.data / name).exists():
            return f"{suite.data / name} is missing"

    # 2. The run, whose errors end only this one.
    out = suite.run.out / row.run_name
    try:
        if row.kind == TOKENIZER:
            return suite.measure_tokenizer(row, out)
        task = find_task(row.kind, row.dataset)
        if task.is_judged and suite.run.judging is None:
            return "needs --judge"
        run = replace(
            suite.run,
            task=task,
            annotations=suite.data / row.file,
            out=out,
            images=suite.data / row.images,
            truth=suite.data / row.truth if row.truth else None,
            best_of=_num_images(row.kind, suite.run.best_of),
            # Settings that a kind does not read must not keep it from resuming.
            clip=suite.run.clip if row.kind in CLIP_KINDS else None,
            judging=suite.run.judging if task.is_judged else None,
        )
        samples = read_samples(run)
        if not systems:
            systems.append(suite.load())
        summary = evaluate(systems[0], run, samples)
    except (CheckpointError, ConfigError, DataError, ImportError) as error:
        return first_line(error)
    assert summary is not None  # no other process works on this run
    return summary


def _num_images(kind: str, best_of: int) -> int:
    """Drawings of a text; 1 where nothing is drawn."""
    if kind in JUDGED:
        return JUDGED[kind].num_images
    return best_of if kind == DRAWN else 1


def _earlier_entries(suite: Suite) -> dict[str, JsonObject]:
    """What an earlier call with this model and limit has written, by the rows' names."""
    file = suite.run.out / RESULTS
    if not file.is_file():
        return {}
    entries: dict[str, JsonObject] = {}
    for entry in json.loads(file.read_text(encoding="utf-8")):
        if (entry["model"], entry["limit"]) == (suite.model, suite.run.limit):
            entries[entry["benchmark"]] = entry
    return entries


def _earlier_result(row: SuiteRow, entry: JsonObject | None) -> SuiteResult:
    """The result of a row that is not run."""
    if entry is None:
        return SuiteResult(row, None, reason="not asked for")
    return SuiteResult(row, entry["ours"], entry["samples"], entry["bad"], entry["not_run"])


def _result(row: SuiteRow, outcome: JsonObject | str) -> SuiteResult:
    """The figure of a row in the summary of its run."""
    if isinstance(outcome, str):
        return SuiteResult(row, None, reason=outcome)

    # 1. Without usable samples there is no figure.
    samples: int = outcome.get("samples") or outcome.get("n", 0)
    bad: int = outcome.get("bad", 0)
    if bad and bad == samples:
        reason = f"no sample is usable: {outcome['bad_first'][0]}"
        return SuiteResult(row, None, samples, bad, reason)

    # 2. The figure.
    value: Any = outcome
    for key in row.metric.split("."):
        if not isinstance(value, Mapping) or value.get(key) is None:
            missing = row.needs or f"{row.metric} in the summary"
            return SuiteResult(row, None, reason=f"needs {missing}")
        value = value[key]
    return SuiteResult(row, round(float(value) * row.scale, 2), samples, bad)


def suite_table(results: Sequence[SuiteResult], model: str) -> str:
    """The results next to the published figures of a model, as a Markdown table."""
    lines = ["| benchmark | metric | ours | samples | published | source |", "| --- " * 6 + "|"]
    for result in results:
        row = result.row
        ours = f"{NOT_RUN}: {result.reason}"
        if result.value is not None:
            ours = f"{result.value:g}"
        published, source = row.published.get(model, ("", ""))
        samples = str(result.samples or "")
        if result.bad:
            samples += f", {result.bad} of them unusable"
        cells = (row.name, row.metric, ours, samples, published, source)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def write_suite(suite: Suite, results: Sequence[SuiteResult], compared: str) -> None:
    """Write OUT/suite.md and OUT/suite.json; `compared`: model of the published figures.

    Raises DataError: the disk refuses.
    """
    out = suite.run.out
    entries: list[JsonObject] = []
    for result in results:
        published = result.row.published.get(compared)
        entries.append(
            {
                "benchmark": result.row.name,
                "model": suite.model,
                "limit": suite.run.limit,
                "metric": result.row.metric,
                "ours": result.value,
                "samples": result.samples,
                "bad": result.bad,
                "published": published and published[0],
                "source": published and published[1],
                "not_run": result.reason,
            }
        )
    with writing(out, DataError):
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / "suite.md", suite_table(results, compared))
        replace_text(out / RESULTS, json.dumps(entries, indent=1) + "\n")
