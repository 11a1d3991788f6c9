"""`seed study FILE.yaml`: rows of settings × seeds × measures, and their table.

Each training and each measure is a job: a command in a process of its own, after those whose
results it reads. A job that is done is skipped. One that was killed runs again on what it left, so
trainings and evaluations resume. The study's folder has

    table.md, runs.csv                what came out
    curves.png, points.png
    prepare/NAME                      the folder of each job, with settings.json (its identity),
    ROW/SEED/train                    log.txt, out/ (its result), and done.json once it has
    ROW/SEED/MEASURE                  succeeded
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.config import load_yaml, project_path, with_values
from seed_multimodal.disk import (
    JsonObject,
    folder_lock,
    read_json_object,
    replace_json,
    replace_text,
    text_stem,
    writing,
)
from seed_multimodal.entry import ended_by_sigterm, kill_with_parent
from seed_multimodal.errors import ConfigError, DataError, SeedError, first_line
from seed_multimodal.evaluation.metrics import t_interval
from seed_multimodal.plots import SUFFIX, color_of, draw_runs, save_figure
from seed_multimodal.progress import Progress
from seed_multimodal.settings import (
    check_identity,
    check_keys,
    check_value,
    find_entry,
    leaves,
    nearest,
    non_negative,
    read_settings,
    setting,
)

# First words of commands: this Python, whichever one PATH has.
PROGRAMS = {"python": [sys.executable], "seed": [sys.executable, "-m", "seed_multimodal"]}
POLL = 0.2  # seconds between two looks at the processes
# Names in braces that are no values and no preparations, columns of runs.csv, and a folder beside
# those of rows.
RESERVED = ("seed", "out", "train", "checkpoint", "row", "finished", "seconds", "prepare")
FILES = ("table.md", "runs.csv", "curves.png", "points.png", "settings.json")
NAME = r"\{([\w.-]+)\}"  # in a command
Values = dict[str, str | bool | int | float]  # name → what stands for it in commands


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
        key: names of the figure in the file, with dots; null there: the row has none.
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
        question: its first paragraph.
        folder: in which the commands run, relative to the working directory or the repository.
        values: name → text or number.
        quick: values of `--quick`.
        prepare: name → command that runs once.
        train: the command of a run, before the settings of its row.
        points: of points.png: the measure along x, and those along y, a panel each.
    """

    name: str
    question: str
    folder: str = "."
    seeds: list[int] = non_negative()
    values: Values = setting(factory=dict)
    quick: Values = setting(factory=dict)
    prepare: dict[str, str] = setting(factory=dict)
    train: str
    rows: list[RowSettings]
    measures: list[MeasureSettings]
    points: list[str] = setting(factory=list)


def read_study(file: Path, n_seeds: int | None = None, quick: bool = False) -> StudySettings:
    """The settings of a file.

    n_seeds: the first seeds only.
    quick: one seed, with the values of `quick`.

    Raises ConfigError: no such file, an unknown key, or a name that is taken twice.
    """
    study = read_settings(StudySettings, load_yaml(file), str(file))
    for key in ("name", "seeds", "rows", "measures"):
        if not getattr(study, key):
            raise ConfigError(f"{file}: {key} is empty.")
    check_keys(study.quick, study.values, f"{file}: quick")
    for key in (*study.values, *study.prepare):
        if text_stem(key) != key:
            raise ConfigError(f"{file}: {key!r} is no name for braces; it may be {text_stem(key)}.")
    # Names are those of folders, and stand in braces.
    rows = [text_stem(row.name) for row in study.rows]
    measures = [text_stem(measure.name) for measure in study.measures]
    names = [*RESERVED, *FILES, *study.values, *study.prepare, *rows, *measures, *study.seeds]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{file}: the name {name!r} is taken twice; rename one.")
    check_keys(study.points, [measure.name for measure in study.measures], f"{file}: points")
    if len(study.points) == 1:
        raise ConfigError(f"{file}: points needs the measure along x, and one or more along y.")
    if quick:
        study.values |= study.quick
    # True and false as in YAML.
    study.values = {
        name: str(value).lower() if isinstance(value, bool) else value
        for name, value in study.values.items()
    }
    study.seeds = study.seeds[: 1 if quick else n_seeds]
    return study


def run_study(study: StudySettings, out: Path, at_once: int, budget: float) -> list[str]:
    """Run what is not done in the folder `out`, and write the results; returns a message for each
    failure. Raises as `plan` and `run_jobs`; ConfigError: the study is running."""
    directory = project_path(study.folder)
    if not directory.is_dir():
        raise ConfigError(f"folder: {directory} is neither here nor in the repository.")
    runs = plan(study, out.resolve())
    jobs = [job for run in runs.values() for job in run.values()]
    with folder_lock(out, ConfigError, "at this study"):
        try:
            failures = run_jobs(jobs, directory, at_once, budget)
        finally:
            problems = write_results(study, runs, out)
    return failures + problems


# ---- what runs


@dataclass
class Job:
    """A command that runs once.

    Attributes:
        folder: of its files, ROW/SEED/STAGE or prepare/NAME.
        words: of the command, with names of folders in braces.
        reads: name → the job whose result that folder is.
        measures: whose figures it writes.
        directory: in which it runs, as the study's file names it.
        done: content of done.json; empty: not finished.
        failed: in this process.
    """

    folder: Path
    words: list[str]
    reads: Mapping[str, Job]
    measures: Sequence[MeasureSettings] = ()
    directory: str = "."
    done: JsonObject = field(default_factory=dict)
    failed: bool = False

    @property
    def out(self) -> Path:
        """The folder of the result."""
        return self.folder / "out"

    def is_ready(self) -> bool:
        """Whether all jobs are done whose results it reads."""
        return all(job.done for job in self.reads.values())

    def is_blocked(self) -> bool:
        """Whether it or a job that it reads has failed."""
        return self.failed or any(job.is_blocked() for job in self.reads.values())

    def find(self, begin: bool = False) -> bool:
        """Whether an earlier run has done it.

        begin: write the identity of a new job.

        Raises DataError: it was begun by another command, or its inputs were made again since.
        """
        inputs = {name: job.done.get("finished", "not done") for name, job in self.reads.items()}
        command = shlex.join(self.words)
        identity = {"command": command, "folder": self.directory, "inputs": inputs}
        check_identity(self.folder, identity, f"--out, move {self.folder} away,", begin)
        file = self.folder / "done.json"
        if file.is_file():
            self.done = read_json_object(file, DataError)
        return bool(self.done)

    def start(self, directory: Path, environment: Mapping[str, str]) -> None:
        """Start the process. Raises DataError: disk error."""
        # 1. The command, with its folders.
        folders = {"out": self.out, **{name: job.out for name, job in self.reads.items()}}
        if "checkpoint" in folders:
            from seed_multimodal.training.checkpoint import newest_checkpoint  # loads torch

            folders["checkpoint"] = newest_checkpoint(folders["checkpoint"])
        program, *arguments = with_values(self.words, folders)

        # 2. The process. How long a resumed job takes is not known.
        log_file = self.folder / "log.txt"
        self.started = None if log_file.exists() else time.monotonic()
        self.log_start = log_file.stat().st_size if log_file.exists() else 0
        with writing(self.folder, DataError):
            self.out.mkdir(parents=True, exist_ok=True)
            self.find(begin=True)
            with open(log_file, "ab") as log:
                self.process = subprocess.Popen(
                    [*PROGRAMS[program], *arguments],
                    cwd=directory,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=kill_with_parent,
                    start_new_session=True,
                )

    def wait(self) -> int:
        """The process's exit code; what it has left running is ended."""
        code = self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return code

    def finish(self) -> None:
        """Write the record of a process that has ended. Raises DataError: it has failed."""
        if self.wait():
            self.failed = True
            raise DataError(self.failure())
        seconds = None if self.started is None else time.monotonic() - self.started
        self.done = {"finished": time.strftime("%Y-%m-%d %H:%M:%S"), "seconds": seconds}
        replace_json(self.folder / "done.json", self.done)

    def failure(self) -> str:
        """A message with the last line of the log."""
        content = (self.folder / "log.txt").read_bytes()[self.log_start :]
        last_line = content.decode(errors="replace").strip().rpartition("\n")[2]
        return f"{self.folder}: ended with code {self.process.returncode}: {last_line}"

    def figures(self) -> tuple[dict[str, float | None], list[str]]:
        """The figures of the result that are there, and a message for each other one."""
        figures: dict[str, float | None] = {}
        problems: list[str] = []
        for measure in self.measures:
            try:
                figures[measure.name] = read_figure(self.out / measure.file, measure.key)
            except SeedError as error:
                problems.append(str(error))
        return figures, problems


# Row and seed → command → job; "" is the training. The preparations are a row without one.
Runs = dict[tuple[str, int], dict[str, Job]]


def run_jobs(
    jobs: Sequence[Job], directory: Path, at_once: int = 1, budget: float = math.inf
) -> list[str]:
    """Run what is not done; returns a message for each job that failed.

    jobs: each after those that it reads.
    directory: in which the commands run.
    at_once: processes.
    budget: seconds.

    Raises DataError as `Job.find`, ConfigError: what is left does not fit into the budget. Then
    running jobs are finished; else, also on SIGTERM, they get SIGTERM.
    """
    waiting = unfinished(jobs)
    deadline = time.monotonic() + budget
    n_threads = max(1, (os.cpu_count() or 1) // at_once)
    environment = {"OMP_NUM_THREADS": str(n_threads), **os.environ}
    running: list[Job] = []
    failures: list[str] = []
    n_done = len(jobs) - len(waiting)
    with ended_by_sigterm(), Progress("study", len(jobs), "run", start=n_done) as progress:
        try:
            while True:
                # 1. Start what is ready, and fits.
                seconds = expected_seconds(jobs) / at_once
                left = deadline - time.monotonic()
                fits = left > 0 and not seconds > left
                ready = [job for job in waiting if job.is_ready()]
                for job in ready[: fits * (at_once - len(running))]:
                    job.start(directory, environment)
                    waiting.remove(job)
                    running.append(job)
                if not running:
                    break

                # 2. See what has ended.
                time.sleep(POLL)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    try:
                        job.finish()
                        progress.update()
                        for problem in job.figures()[1]:
                            progress.write_line(problem)
                    except DataError as error:
                        failures.append(str(error))
                        progress.write_line(str(error))
        finally:
            for job in running:
                job.process.terminate()
            for job in running:  # a training saves a checkpoint
                progress.write_line(f"{job.folder}: is being ended; Ctrl-C kills it.")
                job.wait()
    n_left = sum(not job.is_blocked() for job in waiting)
    if n_left and not fits:
        raise ConfigError(
            f"study: {n_left} commands do not fit into --budget {budget:g}: they need about "
            f"{seconds:.3g} s with --jobs {at_once}, and {max(left, 0):.3g} s are left. Give more "
            "of these, fewer --seeds, or --quick; what is done stays."
        )
    return failures


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Those that are not done. Raises DataError: folders of other commands or inputs, all by
    name."""
    waiting: list[Job] = []
    refusals: dict[str, str] = {}
    for job in jobs:
        try:
            if not job.find():
                waiting.append(job)
        except DataError as error:
            refusals[str(job.folder)] = str(error)
    if refusals:
        first, *others = refusals
        also = f" So were {', '.join(others)}." if others else ""
        raise DataError(f"{refusals[first]}{also}")
    return waiting


def expected_seconds(jobs: Sequence[Job]) -> float:
    """Seconds of the jobs that are not done and can be, one after another: as others of the row
    and stage, else of the stage. NaN: a stage has not been timed."""
    timings: dict[object, float] = {}
    total = 0.0
    possible = [job for job in jobs if not job.is_blocked()]
    for job in sorted(possible, key=lambda job: not job.done):
        row, _, stage = job.folder.parts[-3:]
        if not job.done:
            total += timings.get((row, stage), timings.get(stage, math.nan))
        elif job.done["seconds"] is not None:
            timings[stage] = timings[row, stage] = job.done["seconds"]
    return total


def plan(study: StudySettings, out: Path) -> Runs:
    """All jobs, each after those that it reads. Raises ConfigError: a command with an unknown
    program or name."""
    # 1. The preparations.
    prepared: dict[str, Job] = {}
    for name, command in study.prepare.items():
        prepared[name] = plan_job(study, out / "prepare" / name, command, study.values, prepared)

    # 2. Seed by seed the training of each row, and a job for each command of the measures.
    runs: Runs = {("prepare", 0): prepared}
    for seed in study.seeds:
        values = {**study.values, "seed": seed}
        results = dict(prepared)
        for row in study.rows:
            stem = text_stem(row.name)
            folder = out / stem / str(seed)
            command = f"{study.train} {row.settings}"
            training = plan_job(study, folder / "train", command, values, results)
            results[stem] = training
            run = {"": training}
            inputs = {**prepared, "train": training, "checkpoint": training}
            for measure in study.measures:
                command = measure.command
                if command not in run:
                    run[command] = plan_job(
                        study, folder / text_stem(measure.name), command, values, inputs
                    )
            for command, job in run.items():
                job.measures = [m for m in study.measures if m.command == command]
            runs[row.name, seed] = run
    return runs


def plan_job(
    study: StudySettings,
    folder: Path,
    command: str,
    values: Mapping[str, object],
    earlier: Mapping[str, Job],
) -> Job:
    """The job of a command; `earlier`: those whose results it may read."""
    label = f"command {command!r}"
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{label}: {first_line(error)}.") from None
    find_entry(PROGRAMS, "".join(words[:1]), f"program ({label})")
    names = re.findall(NAME, command)
    check_keys(names, ["out", *values, *earlier], label)
    reads = {name: job for name, job in earlier.items() if name in names}
    return Job(folder, with_values(words, values), reads, directory=study.folder)


# ---- results


def write_results(study: StudySettings, runs: Runs, out: Path) -> list[str]:
    """Write table.md, runs.csv and pictures of the trainings that are done; returns a message for
    each figure that is missing. Raises DataError: disk error."""
    # 1. The figures of each run.
    lines: list[JsonObject] = []
    logs: dict[Path, str] = {}
    problems: list[str] = []
    for (row, seed), run in runs.items():
        if "" in run and run[""].done:
            line: JsonObject = {"row": row, "seed": seed}
            line |= dict.fromkeys(measure.name for measure in study.measures)
            for job in run.values():
                if job.done:
                    figures, missing = job.figures()
                    line |= figures
                    problems += missing
            lines.append({**line, **run[""].done})
            logs |= dict.fromkeys(run[""].out.rglob(f"*{SUFFIX}"), row)
    if not lines:
        return problems

    # 2. The files.
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    replace_text(out / "runs.csv", text.getvalue())
    replace_text(out / "table.md", table(study, lines))
    try:
        if logs:
            draw_runs([*logs], out / "curves.png", [*logs.values()])
        if study.points:
            draw_points(study, lines, out / "points.png")
    except SeedError as error:
        problems.append(str(error))
    return problems


def read_figure(file: Path, key: str) -> float | None:
    """The figure of a JSON file at a key with dots. Raises SeedError: none, or no number."""
    content = read_json_object(file, DataError)
    figure: Any = content
    for part in [key] if key in content else re.findall(r"[^.\[\]]+", key):
        try:
            figure = figure[int(part) if isinstance(figure, list) else part]
        except (LookupError, TypeError, ValueError):
            keys = [name for name, _ in leaves(content)]
            raise DataError(
                f"{file}: {key} is missing{nearest(key, keys)}; there are {', '.join(keys[:20])}."
            ) from None
    return None if figure is None else check_value(float, figure, f"{file}: {key}")


def figures_by_seed(lines: Sequence[JsonObject], row: str, measure: str) -> dict[int, float]:
    """The figures of a row's runs; `lines`: those of runs.csv."""
    return {
        line["seed"]: line[measure]
        for line in lines
        if line["row"] == row and line[measure] is not None
    }


def draw_points(study: StudySettings, lines: Sequence[JsonObject], out: Path) -> None:
    """Plot a point for each row, with the intervals along both axes."""
    from matplotlib.figure import Figure

    x_name, *panels = study.points
    figure = Figure(figsize=(4.5 * len(panels) + 1.5, 4), dpi=110, layout="constrained")
    for index, name in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), index, xlabel=x_name, ylabel=name)
        axes.grid(alpha=0.4)
        for color, row in enumerate(study.rows):
            figures = [figures_by_seed(lines, row.name, key) for key in (x_name, name)]
            if all(figures):
                x, y = [t_interval([*by_seed.values()]) for by_seed in figures]
                axes.errorbar(
                    x.value,
                    y.value,
                    xerr=x.value - x.low,
                    yerr=y.value - y.low,
                    fmt="o",
                    capsize=2,
                    color=color_of(color, len(study.rows)),
                    label=row.name,
                )
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=7, loc="outside right upper")
    save_figure(figure, out)


def table(study: StudySettings, lines: Sequence[JsonObject]) -> str:
    """The results in Markdown; `lines`: those of runs.csv."""
    # 1. What was run.
    first = study.rows[0].name
    values = "".join(f", {name} {value}" for name, value in study.values.items())
    date = max(line["finished"] for line in lines)[:10]
    text = (
        f"# {study.name}\n\n{study.question}\n\nFinished {date}{values}. "
        "Means over runs of different seeds ± half of their 95 % interval (Student's t). One run "
        "has no interval. (n): of n runs alone."
    )

    # 2. The rows: a table of means, and one of differences.
    names = [measure.name for measure in study.measures]
    arrows = [f" {cell(m.name)} {'↑' if m.higher else '↓'} |" for m in study.measures]
    head = f"| | runs |{''.join(arrows)}\n{'| --- ' * (2 + len(names))}|\n"
    means = differences = head
    for row in study.rows:
        n_runs = sum(line["row"] == row.name for line in lines)
        means += f"| {cell(row.name)} | {n_runs} |"
        differences += f"| {cell(row.name)} | {n_runs} |"
        for name in names:
            figures = figures_by_seed(lines, row.name, name)
            baseline = figures_by_seed(lines, first, name) if row.name != first else {}
            paired = [figures[seed] - baseline[seed] for seed in figures if seed in baseline]
            scale = max(map(abs, [*figures.values(), *baseline.values()]), default=0.0)
            means += f" {interval([*figures.values()])}{only(len(figures), n_runs)} |"
            differences += f" {interval(paired, '+', scale)}{only(len(paired), n_runs)} |"
        means += "\n"
        differences += "\n"
    return f"{text}\n\n{means}\nDifferences to {first!r}, paired by seed:\n\n{differences}"


def cell(text: str) -> str:
    """A name in a table of Markdown."""
    return text.replace("|", r"\|")


def only(n_figures: int, n_runs: int) -> str:
    """How many of the runs have a figure, if not all."""
    return f" ({n_figures})" if 0 < n_figures < n_runs else ""


def interval(values: Sequence[float], sign: str = "", scale: float = 0.0) -> str:
    """Mean ± half of the 95 % interval of runs, to its second digit.

    sign, scale: "+" of differences, and the size of the figures that they are of.
    """
    if not values:
        return ""
    mean = t_interval(values)
    half = mean.value - mean.low
    if half <= 1e-9 * max(scale, *map(abs, values)):
        equal = " ± 0" if mean.n > 1 else ""
        text = f"{mean.value:{sign}.4g}{equal}"
    elif half < 1e-5:
        text = f"{mean.value:{sign}.3g} ± {half:.2g}"
    else:
        digits = max(0, 1 - math.floor(math.log10(half)))
        text = f"{mean.value:{sign}.{digits}f} ± {half:.{digits}f}"
    return text.replace("-", "−")
