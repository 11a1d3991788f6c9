"""When the stages of a work folder ran: `WORK/times.jsonl`.

A run of a stage has a line at its begin, with the machine and the commit, and one at its end. A run
that was killed has no end: it counts up to the next run of its stage, else to the last line of the
file.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from seed_multimodal.disk import JsonObject, disk_reason, strict_json, writing
from seed_multimodal.errors import DataError
from seed_multimodal.evaluation import machine
from seed_multimodal.settings import check_value
from seed_nano.train.workspace import Workspace

FILE = "times.jsonl"


@dataclass
class StageRun:
    """A run of a stage: its begin and end in seconds since 1970, name of the CPU, cores that it
    might use, name of the GPU ("": none), and commit of the source."""

    stage: str
    begun: float
    ended: float
    cpu: str
    cores: int
    gpu: str
    commit: str


@contextlib.contextmanager
def timed(space: Workspace, stage: str) -> Iterator[None]:
    """Record the block as a run of a stage, also if it fails or is stopped."""
    conditions = {**machine.hardware(space.device), "commit": machine.commit()}
    _append(space.work, {"stage": stage, "begun": time.time(), **conditions})
    try:
        yield
    finally:
        _append(space.work, {"stage": stage, "ended": time.time()})


def _append(work: Path, line: JsonObject) -> None:
    """Write a line in one call, since stages run side by side."""
    with writing(work), open(work / FILE, "a", encoding="utf-8") as file:
        file.write(strict_json(line) + "\n")


def read_runs(work: Path) -> list[StageRun]:
    """All runs of stages, in the order of their begins. Raises DataError: the file is damaged."""
    file = work / FILE
    if not file.is_file():
        return []
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        moments = [
            check_value(float, line["ended" if "ended" in line else "begun"], str(file))
            for line in lines
        ]
        runs: list[StageRun] = []
        open_runs: dict[str, StageRun] = {}
        for line, moment in zip(lines, moments, strict=True):
            stage = line["stage"]
            # An end, or the next begin after a kill.
            if stage in open_runs:
                open_runs.pop(stage).ended = moment
            if "begun" in line:
                cpu = check_value(str, line["cpu"], f"{file}: cpu")
                cores = check_value(int, line["cores"], f"{file}: cores")
                commit = check_value(str, line["commit"], f"{file}: commit")
                run = StageRun(
                    stage=stage,
                    begun=moment,
                    ended=max(moments),
                    cpu=cpu,
                    cores=cores,
                    gpu=line.get("gpu", ""),
                    commit=commit,
                )
                open_runs[stage] = run
                runs.append(run)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({disk_reason(error)}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: a line is damaged ({error!r}).") from error
    return runs


def minutes_of(runs: Iterable[StageRun]) -> list[tuple[str, str, str]]:
    """Stage, minutes, and from when to when, from the first run's begin on."""
    rows = []
    ordered = sorted(runs, key=lambda run: run.begun)
    for run in ordered:
        begun, ended = ((moment - ordered[0].begun) / 60 for moment in (run.begun, run.ended))
        rows.append((run.stage, f"{ended - begun:.1f}", f"{begun:.1f} … {ended:.1f}"))
    return rows


def wall_seconds(runs: Iterable[StageRun]) -> float:
    """Seconds in which at least one of the runs went on."""
    total = 0.0
    covered_to = -math.inf
    for run in sorted(runs, key=lambda run: run.begun):
        total += max(0.0, run.ended - max(run.begun, covered_to))
        covered_to = max(covered_to, run.ended)
    return total
