"""The commands of a study: processes, each after those whose results it reads.

A job's folder has `settings.json` (its identity), `log.txt`, `out/` (its result) and, once it has
succeeded, `done.json`. A job that is done is skipped. One that was killed runs again on what it
left, so trainings and evaluations resume.
"""

from __future__ import annotations

import datetime
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from seed_multimodal.disk import JsonObject, read_json_object, replace_json, writing
from seed_multimodal.entry import ended_by_sigterm, kill_with_parent
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.progress import Progress
from seed_multimodal.settings import check_identity

# First words of commands: this Python, whichever one PATH has.
PROGRAMS = {"python": [sys.executable], "seed": [sys.executable, "-m", "seed_multimodal"]}
PLACEHOLDER = re.compile(r"\{(\w+)\}")
POLL = 0.2  # seconds between two looks at the processes
STOP = 30  # seconds in which a process may end by SIGTERM


def fill(text: str, values: Mapping[str, object]) -> str:
    """A text with values in place of their names in braces; other names stay."""
    return PLACEHOLDER.sub(lambda match: str(values.get(match[1], match[0])), text)


@dataclass
class Job:
    """A command that runs once.

    Attributes:
        folder: of its files.
        row, stage: jobs of the same ones take about the same time.
        words: of the command, with names of folders in braces.
        reads: name → the job whose result that folder is.
        done: content of done.json; empty: not finished.
    """

    folder: Path
    row: str
    stage: str
    words: list[str]
    reads: Mapping[str, Job]
    done: JsonObject = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """The folder of the result."""
        return self.folder / "out"

    def is_ready(self) -> bool:
        """Whether all jobs are done whose results it reads."""
        return all(job.done for job in self.reads.values())

    def find(self, begin: bool = False) -> bool:
        """Whether an earlier run has done it.

        begin: write the identity of a new job.

        Raises DataError: it was begun by another command, or its inputs were made again since.
        """
        inputs = {name: job.done["finished"] for name, job in self.reads.items()}
        identity = {"command": shlex.join(self.words), "inputs": inputs}
        check_identity(self.folder, identity, f"--out, move {self.folder} away,", begin)
        file = self.folder / "done.json"
        if file.is_file():
            self.done = read_json_object(file, DataError)
        return bool(self.done)

    def start(self, directory: Path, environment: Mapping[str, str]) -> None:
        """Start the process. Raises DataError: disk error, or no checkpoint."""
        # 1. The command, with its folders.
        folders = {"out": self.out, **{name: job.out for name, job in self.reads.items()}}
        if any("{checkpoint}" in word for word in self.words):
            folders["checkpoint"] = newest_checkpoint(folders["train"])
        program, *arguments = [fill(word, folders) for word in self.words]

        # 2. The process. How long a resumed job takes is not known.
        log_file = self.folder / "log.txt"
        self.started = math.nan if log_file.exists() else time.monotonic()
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
                )

    def finish(self) -> None:
        """Write the record of a process that has succeeded."""
        finished = datetime.datetime.now().isoformat()
        self.done = {"finished": finished, "seconds": time.monotonic() - self.started}
        with writing(self.folder, DataError):
            replace_json(self.folder / "done.json", self.done)

    def failure(self) -> str:
        """A message with the last line of the log."""
        text = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")
        last_line = text.strip().rpartition("\n")[2]
        return f"{self.folder}: ended with code {self.process.returncode}: {last_line}"


def newest_checkpoint(folder: Path) -> Path:
    """The last checkpoint of a training. Raises DataError: none."""
    from seed_multimodal.training.checkpoint import checkpoints  # loads torch

    for _, checkpoint in checkpoints(folder):
        return checkpoint
    raise DataError(f"{folder}: has no checkpoint-N for {{checkpoint}}.")


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
    deadline = time.monotonic() + budget
    n_threads = max(1, (os.cpu_count() or 1) // at_once)
    environment = {"OMP_NUM_THREADS": str(n_threads), **os.environ}
    waiting = [job for job in jobs if not (job.is_ready() and job.find())]
    running: list[Job] = []
    failures: list[str] = []
    progress = Progress("study", len(jobs), "run", start=len(jobs) - len(waiting))
    with ended_by_sigterm(), closing(progress):
        try:
            while True:
                # 1. Under a budget one job runs at a time until each stage has been timed.
                seconds = expected_seconds(jobs) / at_once
                left = deadline - time.monotonic()
                fits = not seconds > left
                limit = 1 if math.isnan(seconds) and left < math.inf else at_once
                if left < math.inf:
                    progress.set_postfix_str(f"about {seconds:.0f} of {left:.0f} s", refresh=False)

                # 2. Start what is ready.
                ready = [job for job in waiting if job.is_ready()]
                for job in ready[: fits * (limit - len(running))]:
                    job.start(directory, environment)
                    waiting.remove(job)
                    running.append(job)
                if not running:
                    break

                # 3. See what has ended.
                time.sleep(POLL)
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    if job.process.returncode == 0:
                        job.finish()
                        progress.update()
                    else:
                        failures.append(job.failure())
                        progress.write_line(failures[-1])
        finally:
            for job in running:
                job.process.terminate()
            for job in running:
                with suppress(subprocess.TimeoutExpired):
                    job.process.wait(STOP)
                job.process.kill()
    if waiting and not fits:
        raise ConfigError(
            f"study: {len(waiting)} commands do not fit into --budget {budget:g}: they need about "
            f"{seconds:.0f} s, of which {left:.0f} s are left. Use a larger one, fewer --seeds, "
            "more --jobs or --quick."
        )
    return failures


def expected_seconds(jobs: Sequence[Job]) -> float:
    """Seconds of the jobs that are not done, one after another: as others of the row and stage,
    else of the stage. NaN: a stage has not been timed."""
    timings: dict[object, float] = {}
    for job in jobs:
        seconds = job.done.get("seconds")
        if seconds is not None:
            timings[job.stage] = timings[job.row, job.stage] = seconds
    total = 0.0
    for job in jobs:
        if not job.done:
            of_stage = timings.get(job.stage, math.nan)
            total += timings.get((job.row, job.stage), of_stage)
    return total
