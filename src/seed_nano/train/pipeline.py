"""Runs a table of stages: what is finished is skipped, independent stages run side by side, a stopped run resumes.

A stage is finished when its record and its files are there; one that does not train must also be newer than
what it needs, and of these settings. Finished trainings are never repeated: a warning names what changed, and what to
remove to train them again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seed_multimodal.disk import folder_lock, read_json_object, replace_text
from seed_multimodal.errors import CheckpointError, SeedError
from seed_multimodal.settings import changed_settings
from seed_multimodal.training.stage import train_stage
from seed_nano.train.task import QUIET, NanoTask
from seed_nano.train.templates import render
from seed_nano.train.workspace import ROOT, Workspace


@dataclass(frozen=True)
class Application:
    """A training by one of the applications, configured by the template of the stage's name.

    Attributes:
        script: in the repository; settings: name of the stage's `StageSettings`.
    """

    script: str
    settings: str

    def command(self, space: Workspace, stage: str) -> list[str]:
        """The process that trains; writes its configuration."""
        file = render(space, stage, self.settings).absolute()
        lavis = ["--cfg-path", str(file)]
        hydra = ["--config-path", str(file.parent), "--config-name", stage]
        return [str(ROOT / self.script), *(lavis if self.script.startswith("SEED_Tokenizer") else hydra)]


@dataclass(frozen=True)
class Program:
    """A module's command; its arguments may name settings and folders."""

    module: str
    arguments: tuple[str, ...]

    def command(self, space: Workspace, stage: str) -> list[str]:
        """The process that runs it."""
        values = {**asdict(space.config), "work": space.work, "out": space.out, "judge": space.judge}
        return ["-m", self.module, *(argument.format(**values) for argument in self.arguments)]


@dataclass(frozen=True)
class Stage:
    """A row of a pipeline.

    Attributes:
        run: a task that is trained, a function of the workspace that returns numbers for the record, or a command.
        needs: stages before it. makes: its files, as `Workspace.path` reads them. reads: settings it depends on,
            besides seed, image_size, start and its own `train_*`.
    """

    name: str
    run: Any
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    reads: tuple[str, ...] = field(default=())

    @property
    def trained(self) -> bool:
        """Whether it is a training, which takes long."""
        return isinstance(self.run, Application) or isinstance(self.run, type) and issubclass(self.run, NanoTask)

    @property
    def settings(self) -> str:
        """Name of its own settings."""
        return self.run.settings if isinstance(self.run, Application) else f"train_{self.name}"


def missing(space: Workspace, stage: Stage) -> str:
    """What a stage has not made yet; "" if it is finished."""
    record = space.record(stage.name)
    files = [record, *map(space.path, stage.makes)]
    if isinstance(stage.run, Application) and record.is_file():
        steps, wanted = read_json_object(record).get("steps", 0), getattr(space.config, stage.settings).steps
        if steps < wanted:
            return f"{steps} of {wanted} steps"
    return next((str(file) for file in files if not file.is_file()), "")


def outdated(space: Workspace, stage: Stage) -> str:
    """Which settings changed, and which needed stages were run again, since a stage was finished; "" if none."""
    record, file = space.record(stage.name), _settings_file(space, stage)
    changes = changed_settings(read_json_object(file), _settings(space, stage)) if file.is_file() else []
    newer = [need for need in stage.needs if (place := space.record(need)).is_file() and record.is_file()
             and place.stat().st_mtime_ns > record.stat().st_mtime_ns]
    return "; ".join([*changes, *(f"{need} was run again" for need in newer)])


def _settings_file(space: Workspace, stage: Stage) -> Path:
    return space.work / f"{stage.name}.settings.json"


def _settings(space: Workspace, stage: Stage) -> dict[str, Any]:
    values = asdict(space.config)
    found = {name: values[name] for name in ("seed", "image_size", "start", *stage.reads) if name in values}
    own = values.get(stage.settings, {})
    return {**found, stage.settings: {name: value for name, value in own.items() if name not in QUIET}}


def is_finished(space: Workspace, stage: Stage) -> bool:
    """Whether a stage can be skipped, which is logged."""
    change = outdated(space, stage)
    if missing(space, stage) or change and not stage.trained:
        return False
    print(f"[{stage.name}] already done: {space.record(stage.name)}", flush=True)
    if change:
        folder = space.record(stage.name).parent
        print(f"[{stage.name}] was trained before this changed: {change}; to train it again remove "
              f"{space.work / stage.name}.*{f' and {folder}' if folder != space.work else ''}.", flush=True)
    return True


def run_stage(space: Workspace, stage: Stage) -> None:
    """Run a stage in this process."""
    record = space.record(stage.name)
    # Only its files are gone: it is finished again from its checkpoint, and nothing that was built on it is outdated.
    times = record.stat() if record.is_file() and not outdated(space, stage) else None
    with _locked(space, stage):
        if stage.trained:
            if times:
                record.unlink()
            train_stage(stage.run(space), space.work)
        else:
            started = time.monotonic()
            numbers = stage.run(space)
            replace_text(record, json.dumps({"stage": stage.name, "seconds": round(time.monotonic() - started, 1),
                                             **numbers}, indent=1))
        _finish(space, stage)
        if times:
            os.utime(record, ns=(times.st_atime_ns, times.st_mtime_ns))


def _finish(space: Workspace, stage: Stage) -> None:
    replace_text(_settings_file(space, stage), json.dumps(_settings(space, stage)))


def _locked(space: Workspace, stage: Stage) -> Any:
    return folder_lock(space.work, SeedError, f"at stage {stage.name} in this work folder", 3.0, f".{stage.name}.lock")


class Pipeline:
    """A run of some stages of a table, up to `jobs` at a time.

    Args:
        child: the command that runs a single stage, whose name is appended.
    """

    def __init__(self, space: Workspace, stages: Sequence[Stage], wanted: Sequence[str], jobs: int,
                 child: Sequence[str]) -> None:
        self.space, self.table, self.jobs, self.child = space, {stage.name: stage for stage in stages}, jobs, child
        self.waiting = [stage for stage in stages if stage.name in wanted]
        self.order = [stage.name for stage in self.waiting]
        self.running: dict[str, tuple[subprocess.Popen[bytes], ExitStack, float]] = {}

    def run(self) -> None:
        """Run all.

        Raises:
            SystemExit: with the code of a command that failed, or 143 after SIGTERM; the others are stopped, too.
            CheckpointError: what a stage needs is not there.
        """
        with self._stopped_together():
            while self.waiting or self.running:
                ready = [stage for stage in self.waiting if self._ready(stage)]
                for stage in ready[:self.jobs - len(self.running)]:
                    self.waiting.remove(stage)
                    if not is_finished(self.space, stage):
                        self._start(stage)
                for name, (process, locks, started) in list(self.running.items()):
                    if process.poll() is None:
                        continue
                    locks.close()
                    del self.running[name]
                    if process.returncode:
                        raise SystemExit(process.returncode if process.returncode > 0 else 128 - process.returncode)
                    self._ended(self.table[name], time.monotonic() - started)
                if self.running:
                    time.sleep(0.1)

    def _before(self, stage: Stage) -> set[str]:
        found: set[str] = set()
        for need in stage.needs:
            if need in self.table:
                found |= {need, *self._before(self.table[need])}
        return found

    def _ready(self, stage: Stage) -> bool:
        return not self._before(stage) & {*self.running, *(other.name for other in self.waiting)}

    def threads(self, stage: Stage) -> int:
        """Cores of a stage: its share of them if another one can run at the same time."""
        alone = all(other == stage.name or other in self._before(stage)
                    or stage.name in self._before(self.table[other]) for other in self.order)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cores if alone else max(1, cores // self.jobs)

    def _start(self, stage: Stage) -> None:
        for need in stage.needs:
            if need in self.table and need not in self.order:
                row = self.table[need]
                gone = [file for file in map(self.space.path, row.makes) if not file.is_file()]
                if gone or not row.makes and missing(self.space, row):
                    raise CheckpointError(f"{gone[0] if gone else self.space.work / need}: is not there yet; stage "
                                          f"{need} makes it (--only {need},{stage.name}).")
        print(f"== {stage.name}", flush=True)
        command = isinstance(stage.run, Application | Program)
        if not command and self.jobs == 1:
            return run_stage(self.space, stage)
        arguments = stage.run.command(self.space, stage.name) if command else [*self.child, stage.name]
        environment = {"OMP_NUM_THREADS": str(self.threads(stage)), "HF_HUB_OFFLINE": "1", **os.environ}
        paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        locks = ExitStack()
        if command:
            locks.enter_context(_locked(self.space, stage))
        process = subprocess.Popen([sys.executable, *arguments],
                                   env={**environment, "PYTHONPATH": os.pathsep.join(paths)})
        self.running[stage.name] = process, locks, time.monotonic()

    def _ended(self, stage: Stage, seconds: float) -> None:
        record = self.space.record(stage.name)
        if isinstance(stage.run, Program) and record.parent == self.space.work:
            replace_text(record, json.dumps({"stage": stage.name, "seconds": round(seconds, 1)}))
        if isinstance(stage.run, Application | Program):
            _finish(self.space, stage)

    @contextmanager
    def _stopped_together(self) -> Iterator[None]:
        """If one stage fails or this process is stopped, all end as after SIGTERM: what they have trained is saved."""
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            for process, _, _ in self.running.values():
                process.terminate()
            for process, locks, _ in self.running.values():
                process.wait()
                locks.close()

    def summary(self) -> Mapping[str, Mapping[str, Any]]:
        """Records of the stages that were run."""
        places = {name: self.space.record(name) for name in self.order}
        return {name: read_json_object(file) for name, file in places.items() if file.is_file()}
