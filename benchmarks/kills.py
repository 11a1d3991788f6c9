"""Kill tiny trainings at random times; the final weights must be those of an unbroken run.

    python benchmarks/kills.py --count 100
    python benchmarks/kills.py --count 20 --trainers llm seed_decoder

Each training of `tests/support/trainers.py` is killed (SIGKILL) several times and resumed: at a
random time, inside the writing of a checkpoint, one of its data workers, or one rank of two. Prints
a JSON line for each trainer; the exit code is 1 after weights or losses that are not equal to the
last bit, a failed resume, or a process that does not end.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shared import ROOT, plain_parser, print_line, rounded, start

from seed_multimodal.device import choose_device
from seed_multimodal.entry import kill_with_parent

SUPPORT = ROOT / "tests" / "support"
sys.path[:0] = [str(SUPPORT), str(SUPPORT / "warm")]

from real_processes import children, free_port  # noqa: E402
from server import SLOW  # noqa: E402
from tensors import equal  # noqa: E402
from trainers import LAVIS, TRAINERS, Trainer  # noqa: E402

STEPS = 24
SAVE_STEPS = 2
KILLS = 4  # of a training
HANG_SECONDS = 900.0
KINDS = ("any time", "checkpoint", "data worker", "rank")


@dataclass
class Training:
    """One training in a folder: `ranks` processes forked from this one, which has the imports."""

    trainer: Trainer
    parts: Path
    output: Path
    ranks: int

    def arguments(self) -> list[str]:
        workers = "trainer.dataloader_num_workers=1"
        if self.trainer.application == LAVIS:
            workers = "run.num_workers=1"
        return self.trainer.arguments(self.parts, self.output, STEPS, SAVE_STEPS, [workers])

    def begin(self) -> list[int]:
        """Start the processes; returns their ids."""
        arguments = self.arguments()
        port = str(free_port())
        return [self._fork(arguments, rank, port) for rank in range(self.ranks)]

    def _fork(self, arguments: Sequence[str], rank: int, port: str) -> int:
        pid = os.fork()
        if pid:
            return pid
        # The child: a session of its own, and its output in a file.
        code = 70
        try:
            kill_with_parent()
            os.setsid()
            log = os.open(f"{self.output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(self.trainer.application)
            os.environ.update(self.trainer.variables(self.parts))
            if self.ranks > 1:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(self.ranks),
                    LOCAL_WORLD_SIZE=str(self.ranks),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port,
                )
            code = self.trainer.main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 the copy of this program must not go on
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def progress(self) -> int:
        """Steps in the log."""
        return len(self.trainer.losses(self.output))


def ended(pids: Sequence[int], seconds: float) -> list[int] | None:
    """The exit codes of processes (negative: a signal); None: one is still there after the time."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    if len(codes) == len(pids):
        return [codes[pid] for pid in pids]
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return None


def session(leaders: Sequence[int]) -> list[int]:
    """Running processes of the sessions of these processes."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended
            state, _, _, leader = stat.read_text().rpartition(")")[2].split()[:4]
            if int(leader) in leaders and state != "Z":
                pids.append(int(stat.parent.name))
    return pids


def is_running(pid: int) -> bool:
    """Whether a child of this process still runs; it can still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def victim(
    kind: str, training: Training, pids: Sequence[int], rng: random.Random, seconds: float
) -> int | None:
    """The process to kill, when its time has come; None: the training ended before.

    seconds: of a whole training.
    """
    deadline = time.monotonic() + rng.random() * seconds
    first = pids[0]
    while is_running(first):
        now = time.monotonic()
        if kind == "checkpoint" and now > deadline - seconds / 2:
            if any(training.output.rglob(".checkpoint-*.tmp")):
                time.sleep(rng.random() * 0.01)
                return first
        elif kind == "data worker" and now > deadline:
            workers = [pid for pid in children(first) if pid in session([first])]
            if workers:
                return rng.choice(workers)
        elif now > deadline and (kind != "rank" or training.progress() > 0):
            return rng.choice(pids) if kind == "rank" else first
        time.sleep(0.002)
    return None


def kill_and_resume(
    training: Training, rng: random.Random, seconds: float
) -> tuple[list[str], list[str]]:
    """Kill a training `KILLS` times, and let it end; returns kinds of kills, and problems."""
    kills: list[str] = []
    problems: list[str] = []
    while True:
        pids = training.begin()
        kind = "none"
        if len(kills) < KILLS:
            kind = "rank" if training.ranks > 1 else rng.choice(KINDS[:3])
            pid = victim(kind, training, pids, rng, seconds)
            if pid is None:
                kind = "none"
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                kills.append(kind)
        codes = ended(pids, HANG_SECONDS)
        if codes is None:
            problems.append(f"hangs after kill {len(kills)} ({kind})")
            return kills, problems
        # Data workers end with their process.
        deadline = time.monotonic() + 30
        while (left := session(pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for orphan in left:
            problems.append(f"an orphan after kill {len(kills)} ({kind})")
            os.kill(orphan, signal.SIGKILL)
        if all(code == 0 for code in codes):
            return kills, problems
        if kind == "none":
            log = Path(f"{training.output}.log").read_text()[-2000:]
            problems.append(f"exit codes {codes} after kill {len(kills)}: {log}")
            return kills, problems


def measure(
    trainer: Trainer, ranks: int, count: int, folder: Path, rng: random.Random
) -> dict[str, Any]:
    """Figures of a trainer: trainings are killed and resumed until there were `count` kills."""
    # 1. The unbroken run.
    parts = folder / trainer.name
    if not parts.exists():
        parts.mkdir()
        trainer.parts(parts)
    unbroken = Training(trainer, parts, folder / f"{trainer.name}-{ranks}-unbroken", ranks)
    begin = time.monotonic()
    codes = ended(unbroken.begin(), HANG_SECONDS)
    seconds = time.monotonic() - begin
    log = Path(f"{unbroken.output}.log").read_text()[-2000:]
    if codes != [0] * ranks:
        return {"kills": 0, "problems": [f"the unbroken run ended with {codes}: {log}"]}
    expected = trainer.result(unbroken.output)

    # 2. Killed ones.
    kinds = collections.Counter[str]()
    problems: list[str] = []
    trainings = 0
    while kinds.total() < count:
        training = Training(trainer, parts, folder / f"{trainer.name}-{ranks}-{trainings}", ranks)
        kills, training_problems = kill_and_resume(training, rng, seconds)
        kinds.update(kills)
        problems += training_problems
        trainings += 1
        print(f"{trainer.name} {ranks}: {dict(kinds)} {problems}", file=sys.stderr)
        if not training_problems:
            result = trainer.result(training.output)
            if result.keys() != expected.keys() or not equal(result, expected):
                problems.append(f"other weights after {kills}")
            if trainer.losses(training.output) != trainer.losses(unbroken.output):
                problems.append(f"other losses after {kills}")
        shutil.rmtree(training.output, ignore_errors=True)
    return {
        "kills": kinds.total(),
        "by_kind": dict(kinds),
        "trainings": trainings,
        "seconds_of_a_training": rounded(seconds),
        "problems": problems,
    }


def run(options: argparse.Namespace) -> int:
    runtime = choose_device("cpu", log=None)
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in SLOW:
        with contextlib.suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(name)
    gc.freeze()

    # Each trainer with one process, and the first three of MultiModalLLM also with two ranks.
    rng = random.Random(options.seed)
    trainers = [entry for entry in TRAINERS if entry.name in options.trainers]
    runs = [(trainer, 1) for trainer in trainers]
    runs += [(trainer, 2) for trainer in trainers if trainer.application != LAVIS][:3]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for trainer, ranks in runs:
            count = max(options.count // len(runs), 1)
            results = measure(trainer, ranks, count, Path(folder), rng)
            settings = {"trainer": trainer.name, "ranks": ranks, "seed": options.seed}
            print_line("kills", options, runtime, settings, results)
            failed = failed or bool(results["problems"])
    return int(failed)


if __name__ == "__main__":
    names = [entry.name for entry in TRAINERS]
    parser = plain_parser(__doc__)
    parser.add_argument("--trainers", nargs="+", default=names, choices=names)
    parser.add_argument("--count", type=int, default=100, help="kills of all trainers together")
    parser.add_argument("--seed", type=int, default=0, help="of the times")
    start(run, parser)
