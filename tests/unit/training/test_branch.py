"""`resume=FOLDER`: a branch of a run, from one of its checkpoints or another run's."""

from __future__ import annotations

from pathlib import Path

import loop_toy as toy
import pytest

WANDB = """
from pathlib import Path

class init:
    def __init__(self, *, project, name, dir, id, resume):
        with open(Path(dir) / "ids.txt", "a") as file:
            file.write(f"{id}\\n")

    def log(self, values, step):
        pass

    def finish(self):
        pass
"""


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    return sorted(
        int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")
    )


@pytest.fixture
def run(tmp_path, capsys):
    """`run(**settings)` trains in the same folder until step `until`.

    Returns the checkpoint that it resumed from.
    """

    def go(until: int, **settings: object) -> str:
        capsys.readouterr()
        options = {"save_steps": 2, "save_total_limit": None, **settings}
        with pytest.raises(SystemExit):
            toy.train(tmp_path, stop_at=until - 1, **options)
        lines = [line for line in capsys.readouterr().out.splitlines() if "resumes from" in line]
        return lines[0].partition(" from ")[2].partition(" ")[0] if len(lines) > 1 else ""

    return go


def test_resume_from_a_folder_starts_a_branch_that_continues(run, tmp_path):
    checkpoints = tmp_path / "toy.checkpoints"
    run(6)
    first = str(checkpoints / "checkpoint-2")
    branch = {"resume": first, "learning_rate": 5e-3}
    assert run(4, **branch) == first
    assert steps(checkpoints) == [2, 4]
    assert steps(checkpoints / "abandoned-1") == [4, 6]
    # The same command, as after a requeue, and `auto` continue the branch.
    assert run(5, **branch) == str(checkpoints / "checkpoint-4")
    assert run(7) == str(checkpoints / "checkpoint-5")
    assert run(8, **branch) == str(checkpoints / "checkpoint-7")
    assert (
        steps(checkpoints / "abandoned-1") == [4, 6] and not (checkpoints / "abandoned-2").exists()
    )
    # A branch of the branch, and back to the first run.
    second = str(checkpoints / "checkpoint-4")
    assert run(5, resume=second) == second
    assert run(6, resume=second) == str(checkpoints / "checkpoint-5")
    assert steps(checkpoints / "abandoned-2") == [6, 8]
    back = str(checkpoints / "abandoned-1" / "checkpoint-6")
    assert run(8, resume=back) == back
    assert steps(checkpoints) == [8] and steps(checkpoints / "abandoned-3") == [2, 4, 6]


def test_resume_from_another_run_continues_after_a_stop(run, tmp_path):
    other = tmp_path / "other"
    with pytest.raises(SystemExit):
        toy.train(other, save_steps=2, save_total_limit=None, stop_at=3)
    named = str(other / "toy.checkpoints" / "checkpoint-2")
    assert run(5, resume=named) == named
    assert run(7, resume=named) == str(tmp_path / "toy.checkpoints" / "checkpoint-5")
    assert steps(other / "toy.checkpoints") == [2, 4]


def test_resume_from_a_branch_whose_start_is_gone(run, tmp_path):
    """`save_total_limit` removes the checkpoint that the command names."""
    run(4)
    named = str(tmp_path / "toy.checkpoints" / "checkpoint-2")
    run(6, resume=named, save_total_limit=1)
    assert not Path(named).exists()
    assert run(8, resume=named, save_total_limit=1).endswith("checkpoint-6")


def test_restart_continues_the_run_of_wandb(run, tmp_path, monkeypatch):
    """A branch, or a new run in a folder of the same name, is another run there."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "package")
    named = str(tmp_path / "toy.checkpoints" / "checkpoint-2")
    run(4, report_to=["wandb"])
    run(6, report_to=["wandb"])
    run(4, report_to=["wandb"], resume=named)
    run(6, report_to=["wandb"], resume=named)
    ids = (tmp_path / "ids.txt").read_text().split()
    assert ids[0] == ids[1] != ids[2] == ids[3]
