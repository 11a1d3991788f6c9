"""Two processes under torchrun equal one with twice the batch, write one checkpoint and log, and
stop together.
"""

import signal

import loop_toy as toy
import pytest
import torch
from real_processes import wait_until
from warm_processes import PYTHON
from yaml_tables import read_tables

from seed_multimodal.errors import CheckpointError

TWO = f"{PYTHON} -m torch.distributed.run --standalone --nproc-per-node 2".split()
TABLES = read_tables(__file__)
EQUAL, ENDLESS = TABLES["equal"], TABLES["endless"]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(900)
def test_two_processes_equal_one_with_the_double_batch_and_stop_together(tmp_path):
    # By torchrun; a second stage in the same processes is stopped by SIGTERM to torchrun.
    folder = tmp_path / "two"
    process = toy.start(folder, EQUAL, ENDLESS, before=TWO)
    toy.train(tmp_path / "one", **{**EQUAL, "batch_size": 8})
    wait_until(lambda: lines(folder) >= 24 + 5, process, 600)
    process.send_signal(signal.SIGTERM)  # to torchrun, which passes it on to both
    output = process.communicate(timeout=200)[0]
    assert output.count("refused: [single]") == 2, output  # a stage for one process
    # Text and image would be one number, the mean of both.
    assert output.count("at step 2 one has ") == 2, output
    mixed = toy.log_lines(folder, "mixed")
    assert [(line["text"], line["image"]) for line in mixed] == [(4, 5)]
    compare_with_one(tmp_path, output)
    assert_stopped_together(folder, output)
    with pytest.raises(CheckpointError, match="samples per step: 8 -> 4"):
        toy.train(folder, **ENDLESS)


def lines(folder, rank=0) -> int:
    """Micro-steps of this process in both stages."""
    file = folder / f"losses.{rank}.txt"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def compare_with_one(folder, output: str):
    """States, losses and log lines are those of one process with the double batch."""
    assert (folder / "two" / "equal.done.json").is_file(), output
    single, double = (toy.saved(folder / run, "equal") for run in ("one", "two"))
    for part in ("model", "trained"):
        torch.testing.assert_close(double[part], single[part], rtol=1e-5, atol=1e-6)
    identities = [state["identity"] for state in (single, double)]
    assert identities == [
        {"processes": 1, "samples_per_step": 16},
        {"processes": 2, "samples_per_step": 16},
    ]

    # Lines of the second stage follow those of the first.
    texts = [
        (folder / "two" / f"losses.{rank}.txt").read_text().splitlines()[:24] for rank in (0, 1)
    ]
    first, second = ([float.fromhex(line.split()[1]) for line in text] for text in texts)
    assert first != second
    means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    expected = list(toy.read_losses(folder / "one").values())
    assert means == pytest.approx(expected, rel=1e-4)

    single_log, double_log = (toy.log_lines(folder / run, "equal") for run in ("one", "two"))
    assert [line["step"] for line in double_log] == list(range(1, 13))
    for key in ("loss", "half", "grad"):
        expected = pytest.approx([line[key] for line in single_log], rel=1e-4)
        assert [line[key] for line in double_log] == expected


def assert_stopped_together(folder, output: str):
    assert output.count("[endless] stopped by SIGTERM or Ctrl-C after step") == 1, output
    state = toy.saved(folder, "endless")
    steps = [lines(folder, rank) - 24 for rank in (0, 1)]
    assert steps == [state["global_step"]] * 2
    assert state["global_step"] >= 5
    assert not (folder / "endless.done.json").exists()
    assert not list(folder.glob(".*tmp"))
