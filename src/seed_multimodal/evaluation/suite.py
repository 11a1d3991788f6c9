"""The papers' tables: every benchmark whose files are there, with the published figures.

The rows are in `suite.yaml`. Runs that several rows share are done once; each has a folder of its
own and resumes; only the tokenizer is measured again. What cannot run (files or weights are
missing) is a row with the reason.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_multimodal.config import read_table
from seed_multimodal.disk import JsonObject, replace_json, replace_text, writing
from seed_multimodal.entry import log_line
from seed_multimodal.errors import CheckpointError, ConfigError, DataError, first_line
from seed_multimodal.evaluation.benchmark import (
    BENCHMARKS,
    EvaluationSettings,
    benchmark_class,
    open_benchmark,
    run,
)
from seed_multimodal.evaluation.tokenizer_settings import TokenizerSettings
from seed_multimodal.settings import check_value, positive, read_settings, setting

if TYPE_CHECKING:
    from seed_multimodal.pipelines.base import MultimodalSystem

ROWS = Path(__file__).with_name("suite.yaml")
TOKENIZER = "tokenizer"
RESULTS = "suite.json"
NO_FIGURE: JsonObject = {"ours": None, "samples": 0, "bad": 0, "not_run": ""}


@dataclass(frozen=True)
class SuiteRow:
    """A figure of a table; fields: see `suite.yaml`."""

    name: str
    kind: str
    file: str
    metric: str
    dataset: str | None = None
    truth: str = ""
    images: str = ""
    scale: float = 1.0
    needs: str = ""
    published: Mapping[str, tuple[float, str]] = field(default_factory=dict)

    @property
    def run_name(self) -> str:
        """Rows of one run have the same."""
        return "_".join([self.kind, *Path(self.file).with_suffix("").parts])


@dataclass(kw_only=True)
class SuiteSettings(EvaluationSettings):
    """Settings of all runs; options: of drawings."""

    model: str
    dtype: str
    data: Path = setting(metavar="DIR", help="folder of the benchmarks (see the docs)")
    compare: str | None = setting(
        None, metavar="MODEL", help="published figures (default: --model's)"
    )
    only: list[str] | None = setting(None, metavar="KIND", help="caption, vqa, choices, …")
    clip: Path | None = setting(None, metavar="DIR", help="CLIP that compares and ranks drawings")
    clip_text: str | None = setting(
        None, metavar="DIR", help="CLIP whose embeddings the tokenizer decodes to"
    )
    best_of: int = positive(1, help="drawings, of which CLIP keeps one")
    judge: Path | None = setting(None, metavar="MODEL", help="detector of GenEval")


def read_suite() -> list[SuiteRow]:
    """The rows of the table. Raises ConfigError: a row of another form."""
    return check_value(list[SuiteRow], read_table(ROWS), str(ROWS))


def commands() -> dict[str, str]:
    """The kind of a benchmark → its command."""
    return {benchmark_class(command).kind: command for command in BENCHMARKS}


def run_suite(settings: SuiteSettings, load: Callable[[], MultimodalSystem]) -> list[JsonObject]:
    """Run the rows in their order, in one process; write and return what suite.json has of them.

    Of kinds that are not among `settings.only` it has the figures of an earlier call with this
    model and limit.

    load: the system, which is loaded for the first row that needs it.
    """
    rows = read_suite()
    if not settings.data.is_dir():
        raise ConfigError(f"{settings.data}: no such folder.")
    kinds = sorted({row.kind for row in rows})
    check_value(list[str], settings.only or [], "--only", choices=kinds)

    # 1. What earlier calls have written, by the rows' names.
    file = settings.out / RESULTS
    same_run = {"model": settings.model, "limit": settings.limit}
    earlier: dict[str, JsonObject] = {}
    if settings.only and file.is_file():
        for figure in json.loads(file.read_text(encoding="utf-8")):
            if figure.items() >= same_run.items():
                earlier[figure["benchmark"]] = figure

    # 2. The rows; runs that several share are done once.
    outcomes: dict[str, JsonObject | str] = {}  # of a run: its summary, or the reason
    load = functools.cache(load)
    entries: list[JsonObject] = []
    for row in rows:
        entry: JsonObject = {"benchmark": row.name, **same_run, "metric": row.metric, **NO_FIGURE}
        if settings.only and row.kind not in settings.only:
            entry |= earlier.get(row.name, {"not_run": "not asked for"})
        else:
            if row.run_name not in outcomes:
                log_line(f"{row.name}: {row.kind} on {settings.data / row.file}")
                outcomes[row.run_name] = _outcome(settings, row, load)
            entry |= _figure(row, outcomes[row.run_name])
        compared = settings.compare or settings.model
        entry["published"], entry["source"] = row.published.get(compared, (None, None))
        entries.append(entry)

    # 3. The table.
    with writing(settings.out, DataError):
        settings.out.mkdir(parents=True, exist_ok=True)
        replace_text(settings.out / "suite.md", suite_table(entries))
        replace_json(file, entries)
    return entries


def _outcome(
    settings: SuiteSettings, row: SuiteRow, load: Callable[[], MultimodalSystem]
) -> JsonObject | str:
    """The summary of a run, or why there is none."""
    # 1. Its files.
    files: dict[str, Path] = {}
    for name in ("file", "truth", "images"):
        if getattr(row, name):
            files[name] = settings.data / getattr(row, name)
    for path in files.values():
        if not path.exists():
            return f"{path} is missing"

    # 2. The run, whose errors end only this one.
    out = settings.out / row.run_name
    common = {**vars(settings), **files, "out": out, "dataset": row.dataset}
    try:
        if row.kind == TOKENIZER:
            from seed_multimodal.evaluation.tokenizer import evaluate_tokenizer

            common |= {"data": str(files["file"]), "image_root": str(files["images"])}
            common |= {"out": str(out), "seed": 0, "clip": None}
            values = _fields_of(TokenizerSettings, common)
            return evaluate_tokenizer(read_settings(TokenizerSettings, values, row.name), log_line)
        command = commands()[row.kind]
        kind = benchmark_class(command)
        if not kind.draws:
            common["options"] = {}
        values = _fields_of(kind, common)
        summary = run(open_benchmark(command, **values), load)
    except (CheckpointError, ConfigError, DataError, ImportError) as error:
        return first_line(error)
    assert summary is not None  # no other process works on this run
    return summary


def _fields_of(kind: Any, values: Mapping[str, object]) -> dict[str, Any]:
    """The values of the fields of a settings class, without None."""
    names = [field.name for field in fields(kind)]
    return {name: values[name] for name in names if values.get(name) is not None}


def _figure(row: SuiteRow, outcome: JsonObject | str) -> JsonObject:
    """The figure of a row in the summary of its run: `ours`, or why there is none: `not_run`."""
    if isinstance(outcome, str):
        return {"not_run": outcome}

    # 1. Without usable samples there is no figure.
    counts = {
        "samples": outcome.get("samples") or outcome.get("n", 0),
        "bad": outcome.get("bad", 0),
    }
    if counts["bad"] and counts["bad"] == counts["samples"]:
        return {**counts, "not_run": f"no sample is usable: {outcome['bad_first'][0]}"}

    # 2. The figure.
    value: Any = outcome
    for key in row.metric.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None:
        return {"not_run": f"needs {row.needs or row.metric}"}
    return {**counts, "ours": round(float(value) * row.scale, 2)}


def suite_table(entries: Sequence[JsonObject]) -> str:
    """The results next to the published figures, as a Markdown table."""
    lines = ["| benchmark | metric | ours | samples | published | source |", "| --- " * 6 + "|"]
    for entry in entries:
        ours = f"not run: {entry['not_run']}"
        if entry["ours"] is not None:
            ours = f"{entry['ours']:g}"
        samples = str(entry["samples"] or "")
        if entry["bad"]:
            samples += f", {entry['bad']} of them unusable"
        published = f"{entry['published'] or ''} | {entry['source'] or ''}"
        lines.append(
            f"| {entry['benchmark']} | {entry['metric']} | {ours} | {samples} | {published} |"
        )
    return "\n".join(lines) + "\n"
