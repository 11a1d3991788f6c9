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
from yaml_tables import read_tables

pytestmark = [pytest.mark.nightly, pytest.mark.process, pytest.mark.timeout(900)]
STEPS = 12
BY_NAME = {entry.name: entry for entry in TRAINERS}


@dataclass(frozen=True)
class Run:
    """Overrides of a run."""

    options: Sequence[str] = ()
    processes: int = 1
    micro_steps: int = 1  # of one step, where the program counts these (LAVIS)


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


def marks(row) -> list[pytest.MarkDecorator]:
    defect = row.get("defect")
    return [pytest.mark.xfail(reason=defect, strict=True)] if defect else []


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row['trainer']} {row['name']}", marks=marks(row))
        for row in read_tables(__file__)
    ],
)
def test_invariant(row, parts_of, tmp_path):
    trainer = BY_NAME[row["trainer"]]
    trainer = replace(trainer, loss=row.get("loss", trainer.loss))
    if trainer.application == LAVIS:
        require_lavis()
    parts = parts_of(trainer)
    first, second = (
        losses(trainer, parts, tmp_path / name, Run(**row[name])) for name in ("first", "second")
    )
    assert_equal_trajectories(first, second, row.get("close", 1e-4))


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
