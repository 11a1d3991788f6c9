"""Invariants of training through the programs' command lines (as TRL's tests/invariant): changes of
how a run is computed do not change what it computes.

Both runs of a row have equal losses within its tolerance, and the residual has zero mean: a
systematic difference, as of a loss that is averaged twice, is no rounding. Killed and resumed
runs, and two processes of every trainer: e2e/test_trainers.py.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from lavis_runs import require_lavis
from tiny import read_json
from trainers import LAVIS, TRAINERS, TWO

pytestmark = [pytest.mark.nightly, pytest.mark.process, pytest.mark.timeout(900)]
STEPS = 12
BY_NAME = {entry.name: entry for entry in TRAINERS}
WORKERS = "trainer.dataloader_num_workers"
ACCUMULATE = "trainer.gradient_accumulation_steps"
ZERO_2 = "deepspeed=configs/deepspeed/stage2_bf16.json"


@dataclass(frozen=True)
class Run:
    """Overrides of a run."""

    options: Sequence[str] = ()
    processes: int = 1
    micro_steps: int = 1  # of one step, where the program counts these (LAVIS)


@dataclass(frozen=True)
class Row:
    """Two runs of a trainer. close: relative tolerance. defect: why they differ, or "". loss: its
    name in the log, if it is not the trainer's (LAVIS's is of the last micro-step)."""

    trainer: str
    name: str
    first: Run
    second: Run
    close: float = 1e-4
    defect: str = ""
    loss: str = ""


LAVIS_ACCUMULATE = ["run.batch_size_train=1", "run.accum_grad_iters=8"]
# Schedules of LAVIS count iterations, so only a constant rate is that of the same step.
STEADY_CODES = [
    "model.restart_every=0",
    "model.kmeans_start=False",
    "run.warmup_steps=0",
    "run.warmup_lr=-1",
]
# The original's gathered features have no gradient in other processes.
GATHER = "model.gather_gradient=True"
ROWS = [
    Row("llm", "8x1=1x8", Run(["data.rows=8"]), Run(["data.rows=1", f"{ACCUMULATE}=8"])),
    Row("llm", "0=2 workers", Run(), Run([f"{WORKERS}=2"]), close=0.0),
    Row(
        "llm",
        "1=2 processes",
        Run([f"{ACCUMULATE}=2"]),
        Run(processes=2),
        defect="each process packs its own part of the data, so a step has other sequences",
    ),
    Row("llm", "plain=ZeRO-2", Run(processes=2), Run([ZERO_2], processes=2)),
    Row(
        "stage2",
        "8x1=1x8",
        Run(["run.batch_size_train=8", *STEADY_CODES]),
        Run([*LAVIS_ACCUMULATE, *STEADY_CODES], micro_steps=8),
        loss="loss",
    ),
    Row("stage1", "0=2 workers", Run(["run.num_workers=0"]), Run(["run.num_workers=2"]), close=0.0),
    Row(
        "stage1",
        "1=2 processes",
        Run(["run.batch_size_train=16", GATHER]),
        Run([GATHER], processes=2),
    ),
    Row(
        "seed_decoder",
        "8x1=1x8",
        Run(["data.batch_size=8"]),
        Run(["data.batch_size=1", f"{ACCUMULATE}=8"]),
        defect="PixelTask.loss seeds its noise by the micro-batch, not by the sample",
    ),
    Row("seed_decoder", "0=2 workers", Run([f"{WORKERS}=0"]), Run([f"{WORKERS}=2"]), close=0.0),
]


@pytest.fixture(scope="module")
def parts_of(tmp_path_factory):
    """Trainer → the folder of its parts, written when it is first used."""
    folders = {}

    def folder(trainer) -> Path:
        if trainer.name not in folders:
            folders[trainer.name] = tmp_path_factory.mktemp(trainer.name)
            trainer.parts(folders[trainer.name])
        return folders[trainer.name]

    return folder


def losses(trainer, parts: Path, out, run) -> list[float]:
    """The loss of each step, of a run by the program."""
    import torch

    torch.set_num_threads(1)  # as in other processes
    arguments = trainer.arguments(parts, out, STEPS * run.micro_steps, 10 * STEPS, run.options)
    if run.processes == 2:
        trainer.run(parts, arguments, *TWO)
    else:
        assert trainer.main(arguments) == 0
    values = trainer.losses(out)
    assert list(values) == list(range(1, STEPS + 1))
    return list(values.values())


def assert_equal_trajectories(first: list[float], second: list[float], close: float):
    assert second == pytest.approx(first, rel=close, abs=0)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    # Four standard errors of the mean, and rounding of a loss in fp32.
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    assert abs(statistics.mean(differences)) <= 4 * error + 1e-6 * statistics.mean(first)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id=f"{row.trainer} {row.name}",
            marks=pytest.mark.xfail(reason=row.defect, strict=True) if row.defect else (),
        )
        for row in ROWS
    ],
)
def test_invariant(row, parts_of, tmp_path):
    trainer = BY_NAME[row.trainer]
    trainer = replace(trainer, loss=row.loss or trainer.loss)
    if trainer.application == LAVIS:
        require_lavis()
    parts = parts_of(trainer)
    first, second = (
        losses(trainer, parts, tmp_path / name, run)
        for name, run in (("first", row.first), ("second", row.second))
    )
    assert_equal_trajectories(first, second, row.close)


def test_padded_rows_equal_packed_rows(parts_of, tmp_path):
    # Sequences of equal lengths, so that both have the same ones in a step.
    trainer = BY_NAME["llm"]
    parts = parts_of(trainer)
    source = {"name": "captions", "decoder": "pretrain.caption"}
    lines = (parts / "data" / "captions.jsonl").read_text().splitlines()
    records = [{**json.loads(line), "text": "a red fox sits on the green hill"} for line in lines]
    file = parts / "equal.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    source["files"] = str(file)
    packed = [f"data.sources=[{hydra(source)}]", "data.rows=2"]
    first = losses(trainer, parts, tmp_path / "packed", Run(packed))
    counts = read_json(tmp_path / "packed" / "summary.json")
    in_a_step, remainder = divmod(counts["data"]["sources"]["captions"]["sequences"], STEPS)
    assert not remainder
    source |= {"batch_size": in_a_step, "max_length": 150}
    padded = [f"data.sources=[{hydra(source)}]", "data.packing=false"]
    second = losses(trainer, parts, tmp_path / "padded", Run(padded))
    assert_equal_trajectories(first, second, 1e-4)


def hydra(fields) -> str:
    """A mapping as a value of an override."""
    return "{" + ", ".join(f"{key}: {value}" for key, value in fields.items()) + "}"
