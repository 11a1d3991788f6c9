"""The record: minutes on two cores from nothing to captions and drawings of which 0.90 are right.

    python -m seed_nano.record check runs/record-0 runs/record-1 runs/record-2

Each folder is the work folder of a run of `seed_nano.train nano`; docs/records.md has the rules.
All figures are computed again from what the run left. A file of `--out` stands for the runs that
were checked when it was written. Exit code 0: a record; 1: runs by the rules that are none; 2: a
folder breaks a rule.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.cli.common import program_parser
from seed_multimodal.disk import read_json_object, replace_json, writing
from seed_multimodal.entry import DONE, SOME_FAILED, run_program
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation.metrics import t_interval
from seed_multimodal.evaluation.study import interval
from seed_multimodal.settings import changed_settings, read_settings
from seed_nano.report.judge import SHIPPED, Judge
from seed_nano.report.samples import Sizes, make_samples
from seed_nano.report.sections import Run, caption, drawing
from seed_nano.report.systems import load_system
from seed_nano.report.write import table
from seed_nano.train.provenance import check_trained_here
from seed_nano.train.times import minutes_of, read_runs, wall_seconds
from seed_nano.train.workspace import Workspace, load_settings, resolve_path

SEEDS = (0, 1, 2)  # fixed, so that none is chosen by its result
SCENES = 250
TARGET = 0.9
SECTIONS = {"captions": caption, "drawings": drawing}


@dataclass(kw_only=True)
class Figures:
    """Of a run; captions, drawings: shares of `val` of which every label is right; cpus: names of
    the CPUs on which its stages ran (empty: a file from before they were kept)."""

    seed: int
    minutes: float
    captions: float
    drawings: float
    cpus: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Record:
    """Runs of one recipe at one commit; settings: all but the seed."""

    date: str
    commit: str
    settings: dict[str, Any]
    runs: list[Figures]


def check_run(work: Path) -> Record:
    """The run in a work folder. Raises DataError, ConfigError: it breaks a rule."""
    # 1. Whether all was trained here, with these settings, on two cores, at one commit.
    config = load_settings("nano", work / "config.yaml")
    space = Workspace(config, work, work / "system")
    runs = [run for run in read_runs(work) if run.stage != "report"]
    commit = check_trained_here(space, runs)

    # 2. What came out, as the report measures it, and what it took.
    judge = Judge.from_pretrained(resolve_path(SHIPPED))
    samples = make_samples("val", Sizes.limited(SCENES))
    evaluation = Run(load_system(space.out, device="cpu", log=None), judge, samples)
    figures = Figures(
        seed=config.seed,
        minutes=round(wall_seconds(runs) / 60, 2),
        cpus=sorted({run.cpu for run in runs}),
        **{name: section(evaluation)["all"].value for name, section in SECTIONS.items()},
    )
    print(f"{work}: {figures}\n\n{table(('stage', 'minutes', 'from … to'), minutes_of(runs))}")
    settings = asdict(config)
    del settings["seed"]
    date = time.strftime("%Y-%m-%d", time.gmtime(max(run.ended for run in runs)))
    return Record(date=date, commit=commit, settings=settings, runs=[figures])


def read_record(file: Path) -> Record:
    """The runs in a file of `--out`. Raises DataError, ConfigError: it is none."""
    return read_settings(Record, read_json_object(file, DataError), str(file))


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise DataError: equal seeds, or others than `SEEDS`."""
    if len(set(seeds)) < len(seeds) or not set(seeds) <= set(SEEDS):
        raise DataError(f"The runs have the seeds {seeds}; train with seed=0, 1 and 2, each once.")


def join_runs(records: Sequence[Record]) -> Record:
    """The record of runs of different seeds. Raises DataError: two recipes."""
    runs = [run for record in records for run in record.runs]
    runs.sort(key=lambda run: run.seed)
    first = records[0]
    for record in records[1:]:
        now = {"commit": record.commit, **record.settings}
        if changes := changed_settings({"commit": first.commit, **first.settings}, now):
            raise DataError(f"The runs differ ({'; '.join(changes)}); train all by one recipe.")
    date = max(record.date for record in records)
    return Record(date=date, commit=first.commit, settings=first.settings, runs=runs)


def differences(record: Record, last: Record) -> list[float]:
    """Minutes less the last record's, paired by seed."""
    minutes = {run.seed: run.minutes for run in last.runs}
    return [run.minutes - minutes[run.seed] for run in record.runs]


def check(options: argparse.Namespace) -> int:
    """The command."""
    # 1. Seeds, before the evaluations.
    last = None
    if options.against:
        last = read_record(options.against)
        if sorted(run.seed for run in last.runs) != list(SEEDS):
            raise DataError(f"--against: {options.against} has not each of the seeds {SEEDS} once.")
    checked = [read_record(path) for path in options.runs if path.is_file()]
    folders = [path for path in options.runs if not path.is_file()]
    seeds = [load_settings("nano", folder / "config.yaml").seed for folder in folders]
    check_seeds(seeds + [run.seed for record in checked for run in record.runs])
    record = join_runs([*checked, *map(check_run, folders)])
    changes = differences(record, last) if last else []

    # 2. The row of docs/records.md, and the file beside it.
    cells = [record.date, record.commit[:8], ", ".join(str(run.seed) for run in record.runs)]
    for name in ("minutes", *SECTIONS):
        cells.append(interval([getattr(run, name) for run in record.runs]))
    print(f"| {' | '.join([*cells, interval(changes, '+') or '–'])} | what changed |")
    if options.out:
        with writing(options.out):
            replace_json(options.out, asdict(record))

    # 3. What it lacks.
    lacking = [f"seed {seed}" for seed in SEEDS if seed not in {run.seed for run in record.runs}]
    for run in record.runs:
        for name in SECTIONS:
            if getattr(run, name) < TARGET:
                lacking.append(f"{name} of seed {run.seed} ({getattr(run, name):.3f} of {TARGET})")
    if last:
        both = [*last.runs, *record.runs]
        names = {name for run in both for name in run.cpus or ["unknown"]}
        if len(names) > 1 or "unknown" in names:
            lacking.append(f"one CPU for both records ({'; '.join(sorted(names))})")
        if t_interval(changes).high >= 0:
            lacking.append("a time that is surely shorter than the last record's")
    print(f"No record; it lacks {', '.join(lacking)}." if lacking else "A record.")
    return SOME_FAILED if lacking else DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = program_parser("python -m seed_nano.record", __doc__ or "")
    parser.add_argument("command", choices=["check"])
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="DIR|FILE",
        help="work folder of a run, or runs that were checked before (--out)",
    )
    parser.add_argument("--against", type=Path, help="the file of the last record")
    parser.add_argument("--out", type=Path, help="write the figures as such a file")
    return run_program(parser, check, arguments, "record")


if __name__ == "__main__":
    raise SystemExit(main())
