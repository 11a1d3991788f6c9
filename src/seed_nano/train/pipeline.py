"""Runs a table of stages: finished stages are skipped, independent ones run in parallel, stopped
runs resume.

A stage is finished if its record exists and, unless it is a training, its settings and required
stages have not changed. Finished trainings are never repeated; a warning lists changed settings.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from seed_multimodal.disk import (
    JsonObject,
    folder_lock,
    read_json_object,
    replace_json,
    replace_text,
)
from seed_multimodal.entry import ended_by_sigterm, kill_with_parent
from seed_multimodal.errors import ConfigError, SeedError
from seed_multimodal.settings import changed_settings
from seed_multimodal.training.trainer import train_stage
from seed_nano.train.times import timed
from seed_nano.train.workspace import (
    QUIET,
    ROOT,
    TRAIN,
    Workspace,
    codebook_sections,
    resolve_path,
)
from seed_nano.world.scene import find_drawings

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
RESOLVERS: dict[str, Callable[..., Any]] = {
    "sum": lambda a, b: a + b,
    "product": lambda a, b: a * b,
    "quotient": lambda a, b: a // b,
    # packed rows of `batch` sequences
    "rows": lambda batch, tokens, length: max(1, batch * tokens // length),
    "sizes": lambda side, sizes: [[int(a * side / 64), int(b * side / 64)] for a, b in sizes],
    "held_out": lambda data: OmegaConf.create(
        OmegaConf.to_yaml(data, resolve=True).replace("records/train/", "records/val/")
    ),
}
for resolver, function in RESOLVERS.items():
    OmegaConf.register_new_resolver(resolver, function, replace=True)


def render(space: Workspace, name: str, settings: str) -> Path:
    """Write the configuration `work/NAME.yaml` of an application; returns its path.

    The template (`templates/SYSTEM/NAME.yaml`) names settings as `${llm.width}`, folders as
    `${work}`, and those of the stage (`settings`) as `${stage.learning_rate}`; its `with_start`
    replaces keys if the stage's `start` is set.
    """
    config = space.config
    stage = getattr(config, settings)
    start = resolve_path(stage.start)
    if stage.start and not start.exists():
        raise ConfigError(f"{settings}.start: {start} does not exist.")
    # 1. Everything that a template may name: settings, folders, what follows from them.
    compiled = config.llm.compile
    if compiled is None:
        compiled = bool(shutil.which("g++"))
    steps = stage.max_steps
    codebook = {}
    if quantizer := getattr(config, "quantizer", None):
        codebook = {
            "sections": codebook_sections(config),
            "causal_queries": quantizer.queries if quantizer.causal else 0,
            "learned": quantizer.kind == "vq",
        }
    values = {
        **asdict(config),
        **space.folders,
        "world": str(find_drawings().absolute()),
        "compile": compiled,
        "codebook": codebook,
        "stage": {
            **asdict(stage),
            "start": str(start.absolute()),
            "run_seed": config.seed + stage.seed,
            "fifth": steps // 5,
            "fifth_or_set": stage.save_steps or max(1, steps // 5),
            "tenth_or_set": stage.save_steps or max(1, steps // 10),
            "samples": steps * stage.gradient_accumulation_steps * stage.batch_size,
            "tensorboard": "tensorboard" in stage.report_to,
        },
        "recipe": OmegaConf.load(TEMPLATES / space.system / f"{name}.yaml"),
    }
    # 2. Resolve the template, then apply the keys for a run that starts from weights.
    recipe: Any = OmegaConf.to_container(OmegaConf.create(values)["recipe"], resolve=True)
    # Kinds of records with the number 0 have no file.
    records = values.get("records")
    amounts = records if isinstance(records, dict) else {}  # LaVIT's has one number
    for data in (recipe.get("data", {}), recipe.get("eval_data", {})):
        for row in list(data.get("sources", ())):
            if amounts.get(Path(row.get("files", "")).stem) == 0:
                data["sources"].remove(row)
    with_start = recipe.pop("with_start", {})
    if stage.start:
        for section, keys in with_start.items():
            recipe[section] |= keys
    file = space.work / f"{name}.yaml"
    source = space.work.absolute() / "config.yaml"
    replace_text(file, f"# Written from {source}\n{OmegaConf.to_yaml(recipe)}")
    return file.absolute()


@dataclass(frozen=True)
class Application:
    """A stage in a process of its own.

    Attributes:
        arguments: of Python; they may name settings and folders, and `file`, the configuration.
        section: the settings of a training, whose configuration is the template of the stage's
            name; empty: no training.
    """

    arguments: tuple[str, ...]
    section: str = ""

    def command(self, space: Workspace, stage: str) -> list[str]:
        """The arguments of Python; writes the configuration."""
        values = {**asdict(space.config), **space.folders, "root": ROOT, "stage": stage}
        if self.section:
            file = render(space, stage, self.section)
            values |= {"file": file, "folder": file.parent}
        return [argument.format(**values) for argument in self.arguments]


@dataclass(frozen=True)
class Stage:
    """A row of a pipeline.

    Attributes:
        run: a `NanoTask` class, a function of the workspace that may return numbers for the record,
            or an `Application`.
        needs: stages before it. reads: settings it depends on, besides seed, image_size, start and
            its own `train_*`.
    """

    name: str
    run: Callable[[Any], Any] | Application
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether the stage is a training."""
        if isinstance(self.run, Application):
            return bool(self.run.section)
        return isinstance(self.run, type)

    def settings(self, space: Workspace) -> JsonObject:
        """Settings that the stage depends on."""
        values = asdict(space.config)
        section = TRAIN + self.name
        if isinstance(self.run, Application) and self.run.section:
            section = self.run.section
        train = {key: value for key, value in values.get(section, {}).items() if key not in QUIET}
        settings = {section: train}
        for key in ("seed", "image_size", "start", *self.reads):
            if key in values:
                settings[key] = values[key]
        return settings

    def is_finished(self, space: Workspace) -> bool:
        """Whether the stage can be skipped (logged)."""
        record = space.record(self.name)
        file = space.work / f"{self.name}.settings.json"
        if not record.is_file():
            return False
        # 1. Changed settings; added or renamed ones do not count.
        before = read_json_object(file) if file.is_file() else {}
        now = self.settings(space)
        common = before.keys() & now.keys()
        changes = changed_settings(
            {key: before[key] for key in common}, {key: now[key] for key in common}
        )
        # 2. Stages before it that ran later.
        finished_at = record.stat().st_mtime_ns
        for need in self.needs:
            earlier = space.record(need)
            if earlier.is_file() and earlier.stat().st_mtime_ns > finished_at:
                changes.append(f"{need} was run again")
        # 3. Trainings are never repeated.
        if changes and not self.trained:
            return False
        print(f"[{self.name}] already done: {record}", flush=True)
        if changes:
            print(
                f"[{self.name}] was trained before this changed: {'; '.join(changes)}; "
                f"to train it again remove {space.work / self.name}*.",
                flush=True,
            )
        return True


@dataclass
class Pipeline:
    """A run of some stages of a table, up to `jobs` at a time.

    Attributes:
        child: the command that runs a single stage, whose name is appended.
        keep_times: write the times of the stages (`times`); False in such a child.
    """

    space: Workspace
    stages: Mapping[str, Stage]
    jobs: int
    child: Sequence[str]
    keep_times: bool = True
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, wanted: Collection[str]) -> None:
        """Run these stages; if one fails or this process is stopped, the others get SIGTERM."""
        waiting = [name for name in self.stages if name in wanted]
        running: dict[Future[None], str] = {}
        with ended_by_sigterm(), ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or running:
                    pending = {*waiting, *running.values()}
                    ready = [name for name in waiting if not self.before(name) & pending]
                    done = [name for name in ready if self.stages[name].is_finished(self.space)]
                    if done:  # what needs them is ready, too
                        waiting = [name for name in waiting if name not in done]
                        continue
                    for name in ready[: self.jobs - len(running)]:
                        waiting.remove(name)
                        self._start(self.stages[name], pool, running)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        del running[future]
                        future.result()
            finally:
                for process in self.processes:
                    process.terminate()
                for process in self.processes:  # an interruption inside an import can be lost
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(30)
                    process.kill()

    def before(self, name: str) -> set[str]:
        """All stages that a stage requires, the requirements of these included."""
        needs = self.stages[name].needs
        return set(needs).union(*map(self.before, needs))

    def _start(
        self, stage: Stage, pool: ThreadPoolExecutor, running: dict[Future[None], str]
    ) -> None:
        if self.jobs == 1:  # in the main thread, which gets the signals
            self._run_timed(stage)
        else:
            running[pool.submit(self._run_timed, stage)] = stage.name

    def _run_timed(self, stage: Stage) -> None:
        times = timed(self.space, stage.name) if self.keep_times else contextlib.nullcontext()
        with times:
            if self.jobs == 1 or isinstance(stage.run, Application):
                self._run(stage)
            else:
                self._process([*self.child, stage.name])

    def _run(self, stage: Stage) -> None:
        space = self.space
        name = stage.name
        started = time.monotonic()
        results: JsonObject = {}
        print(f"== {name}", flush=True)
        # One process at a time runs a stage in a work folder.
        with folder_lock(
            space.work, SeedError, f"at stage {name} in this work folder", 3.0, f".{name}.lock"
        ):
            # Trainings write their own records.
            record = space.record(name)
            is_recorded_here = not stage.trained and record.parent == space.work
            if is_recorded_here:  # a stage that is stopped has not finished
                record.unlink(missing_ok=True)
            if isinstance(stage.run, Application):
                self._process(stage.run.command(space, name))
            elif stage.trained:
                train_stage(stage.run(space), space.work)
            else:
                results = stage.run(space) or {}
            if is_recorded_here:
                facts = {"stage": name, "seconds": round(time.monotonic() - started, 1), **results}
                replace_json(record, facts)
            replace_json(space.work / f"{name}.settings.json", stage.settings(space))

    def _process(self, arguments: Sequence[str]) -> None:
        threads = max(1, torch.get_num_threads() // self.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **os.environ}
        import_path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(import_path)
        process = subprocess.Popen(
            [sys.executable, *arguments], env=environment, preexec_fn=kill_with_parent
        )
        self.processes.append(process)
        code = process.wait()
        if code != 0:
            raise SystemExit(code if code > 0 else 128 - code)
