"""`seed study FILE.yaml`: rows of settings × seeds × measures, and their table.

Each training and each measure is a command in a process of its own (`study_jobs`). The study's
folder has

    table.md, runs.csv, curves.png    what came out
    prepare/NAME                      a folder of each job
    ROW/SEED/train
    ROW/SEED/MEASURE
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from seed_multimodal.config import load_yaml, project_path
from seed_multimodal.disk import (
    JsonObject,
    folder_lock,
    read_json_object,
    replace_text,
    text_stem,
    writing,
)
from seed_multimodal.errors import ConfigError, DataError, first_line
from seed_multimodal.evaluation.metrics import t_interval
from seed_multimodal.evaluation.study_jobs import PLACEHOLDER, PROGRAMS, Job, fill, run_jobs
from seed_multimodal.plots import SUFFIX, draw_runs
from seed_multimodal.settings import (
    check_keys,
    check_value,
    find_entry,
    non_negative,
    read_settings,
    setting,
)

# Names in braces that are no values and no jobs; the last one is a folder beside those of rows.
RESERVED = ("seed", "out", "train", "checkpoint", "prepare")
Runs = dict[tuple[str, int], dict[str, Job]]  # row and seed → command → job; "": the training


@dataclass(kw_only=True)
class RowSettings:
    """A row of the table; `settings`: the end of the training's command."""

    name: str
    settings: str = ""


@dataclass(kw_only=True)
class MeasureSettings:
    """A figure of each run.

    Attributes:
        command: writes `file`; measures with the same one share a process. Empty: the training
            writes it.
        file: JSON in {out}.
        key: names of the figure in the file, with dots.
        higher: whether more is better.
    """

    name: str
    command: str = ""
    file: str
    key: str
    higher: bool = True


@dataclass(kw_only=True)
class StudySettings:
    """A study's file.

    Commands begin with python or seed, and use no shell. Names in braces are {seed}, one of
    `values`, or a folder: {out} of the command's result, {NAME} of the result of a preparation or
    of an earlier row with the same seed. Measures also have {train}, the training's result, and
    {checkpoint}, the newest one in it.

    Attributes:
        name: of the table.
        question: its first paragraph of the table.
        folder: in which the commands run, relative to the working directory or the repository.
        values: name → text or number.
        quick: values of `--quick`.
        prepare: name → command that runs once.
        train: the command of a run, before the settings of its row.
    """

    name: str
    question: str
    folder: str = "."
    seeds: list[int] = non_negative()
    values: dict[str, str | int | float] = setting(factory=dict)
    quick: dict[str, str | int | float] = setting(factory=dict)
    prepare: dict[str, str] = setting(factory=dict)
    train: str
    rows: list[RowSettings]
    measures: list[MeasureSettings]


def read_study(file: Path, n_seeds: int | None = None, quick: bool = False) -> StudySettings:
    """The settings of a file.

    n_seeds: the first seeds only.
    quick: one seed, with the values of `quick`.

    Raises ConfigError: no such file, an unknown key, or a name that is taken twice.
    """
    study = read_settings(StudySettings, load_yaml(file), str(file))
    check_keys(study.quick, study.values, f"{file}: quick")
    # Names are those of folders, and stand in braces.
    rows = [text_stem(row.name) for row in study.rows]
    measures = [text_stem(measure.name) for measure in study.measures]
    names = [*RESERVED, *study.values, *study.prepare, *rows, *measures, *study.seeds]
    doubles = [name for name in names if names.count(name) > 1]
    if doubles or not (rows and measures and study.seeds):
        raise ConfigError(
            f"{file}: needs seeds, rows and measures, all of different names; taken twice: "
            f"{doubles[:1]}."
        )
    if quick:
        study.values |= study.quick
    study.seeds = study.seeds[: 1 if quick else n_seeds]
    return study


def run_study(study: StudySettings, out: Path, at_once: int, budget: float) -> list[str]:
    """Run what is not done in the folder `out`, and write the results; returns a message for each
    failure. Raises as `plan` and `run_jobs`; ConfigError: the study is running."""
    directory = project_path(study.folder)
    if not directory.is_dir():
        raise ConfigError(f"folder: {directory} is neither here nor in the repository.")
    jobs, runs = plan(study, out.resolve())
    with folder_lock(out, ConfigError, "at this study"):
        try:
            return run_jobs(jobs, directory, at_once, budget)
        finally:
            write_results(study, runs, out)


# ---- what runs


def plan(study: StudySettings, out: Path) -> tuple[list[Job], Runs]:
    """All jobs, each after those that it reads, and those of the runs. Raises ConfigError: a
    command with an unknown program or name."""
    # 1. The preparations.
    prepared: dict[str, Job] = {}
    for name, command in study.prepare.items():
        folder = out / "prepare"
        prepared[name] = plan_job(folder, "prepare", name, command, study.values, prepared)
    jobs = [*prepared.values()]

    # 2. Seed by seed the training of each row, and a job for each command of the measures.
    runs: Runs = {}
    for seed in study.seeds:
        values = {**study.values, "seed": seed}
        results = dict(prepared)
        for row in study.rows:
            stem = text_stem(row.name)
            folder = out / stem / str(seed)
            command = f"{study.train} {row.settings}"
            training = plan_job(folder, stem, "train", command, values, results)
            results[stem] = training
            run = {"": training}
            inputs = {**prepared, "train": training}
            for measure in study.measures:
                if measure.command not in run:
                    run[measure.command] = plan_job(
                        folder, stem, text_stem(measure.name), measure.command, values, inputs
                    )
            runs[row.name, seed] = run
            jobs += run.values()
    return jobs, runs


def plan_job(
    folder: Path,
    row: str,
    stage: str,
    command: str,
    values: Mapping[str, object],
    earlier: Mapping[str, Job],
) -> Job:
    """The job of a command in FOLDER/STAGE; `earlier`: jobs whose results it may read."""
    label = f"{row}: {stage}: {command!r}"
    try:
        words = [fill(word, values) for word in shlex.split(command)]
    except ValueError as error:
        raise ConfigError(f"{label}: {first_line(error)}.") from None
    find_entry(PROGRAMS, "".join(words[:1]), f"program ({label})")
    names = set(PLACEHOLDER.findall(command))
    if "train" in earlier:  # a measure, which may name the newest checkpoint
        names = names - {"checkpoint"} | {"train"}
    check_keys(names, ["out", *values, *earlier], label)
    reads = {name: job for name, job in earlier.items() if name in names}
    return Job(folder / stage, row, stage, words, reads)


# ---- results


def write_results(study: StudySettings, runs: Runs, out: Path) -> None:
    """Write table.md, runs.csv and curves.png of the runs that are done. Raises DataError,
    ConfigError: a figure is missing."""
    # 1. The figures of each run.
    lines: list[JsonObject] = []
    logs: dict[Path, str] = {}
    for (row, seed), run in runs.items():
        if all(job.done for job in run.values()):
            line = {"row": row, "seed": seed}
            for measure in study.measures:
                file = run[measure.command].out / measure.file
                line[measure.name] = read_figure(file, measure.key)
            lines.append({**line, **run[""].done})
            logs |= dict.fromkeys(run[""].out.glob(f"*{SUFFIX}"), row)
    if not lines:
        return

    # 2. The files.
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0])
    writer.writeheader()
    writer.writerows(lines)
    with writing(out, DataError):
        replace_text(out / "runs.csv", text.getvalue())
        replace_text(out / "table.md", table(study, lines))
    if logs:
        draw_runs([*logs], out / "curves.png", [*logs.values()])


def table(study: StudySettings, lines: Sequence[JsonObject]) -> str:
    """The results in Markdown; `lines`: those of runs.csv."""
    # 1. What was run.
    first = study.rows[0].name
    values = ", ".join(f"{name} {value}" for name, value in study.values.items())
    text = (
        f"# {study.name}\n\n{study.question}\n\nFinished {lines[-1]['finished'][:10]}; {values}. "
        "Means over runs of different seeds with 95 % intervals (Student's t), and differences "
        f"to {first!r}, paired by seed; bold: the interval is without 0. One run has no interval."
        "\n\n| | runs |"
    )

    # 2. The rows.
    for measure in study.measures:
        text += f" {measure.name} {'↑' if measure.higher else '↓'} | difference |"
    text += "\n" + "| --- " * (2 + 2 * len(study.measures)) + "|\n"
    baseline = {line["seed"]: line for line in lines if line["row"] == first}
    for row in study.rows:
        run_lines = [line for line in lines if line["row"] == row.name]
        text += f"| {row.name} | {len(run_lines)} |"
        for name in [measure.name for measure in study.measures]:
            figures = {line["seed"]: line[name] for line in run_lines}
            paired = figures.keys() & baseline if row.name != first else ()
            differences = [figures[seed] - baseline[seed][name] for seed in paired]
            text += f" {interval([*figures.values()])} | {interval(differences, '+')} |"
        text += "\n"
    return text


def read_figure(file: Path, key: str) -> float:
    """A number of a JSON file. Raises DataError, ConfigError: no such file, or no number there."""
    values = OmegaConf.create(read_json_object(file, DataError))
    return float(check_value(float, OmegaConf.select(values, key), f"{file}: {key}"))


def interval(values: Sequence[float], sign: str = "") -> str:
    """Mean and 95 % interval of runs; `sign`: "+" of differences."""
    if not values:
        return ""
    mean = t_interval(values)
    text = f"{mean.value:{sign}.4g}"
    if mean.n > 1:
        text += f" ({mean.low:.4g} … {mean.high:.4g})"
        if sign and mean.low * mean.high > 0:
            text = f"**{text}**"
    return text.replace("-", "−")
