"""`resume=FOLDER`: a branch of a run, from one of its checkpoints or another run's; remains of a
killed run."""

import shutil

import loop_toy as toy
import pytest

from seed_multimodal.errors import CheckpointError


@pytest.fixture
def run(tmp_path, capsys):
    """`run(until, folder, **settings)` trains in a folder, by default the same one, until a step;
    returns the checkpoint that it resumed from."""

    def go(until: int, folder=tmp_path, **settings) -> str:
        capsys.readouterr()
        options = {"save_steps": 2, "save_total_limit": None, **settings}
        with pytest.raises(SystemExit):
            toy.train(folder, stop_at=until - 1, **options)
        lines = [line for line in capsys.readouterr().out.splitlines() if "resumes from" in line]
        return lines[0].partition(" from ")[2].partition(" ")[0] if len(lines) > 1 else ""

    return go


def test_resume_from_another_run_continues_after_a_stop(run, tmp_path):
    # The other run's folder is only read; the same command again continues this one.
    other = tmp_path / "other"
    run(4, other)
    named = str(other / "toy.checkpoints" / "checkpoint-2")
    assert run(5, resume=named) == named
    checkpoints = tmp_path / "toy.checkpoints"
    assert run(6, resume=named) == str(checkpoints / "checkpoint-5")
    assert run(7) == str(checkpoints / "checkpoint-6")
    newest = str(checkpoints / "checkpoint-7")
    assert run(8, resume=newest) == newest
    assert toy.steps(other) == [4, 2]


def test_resume_from_a_checkpoint_that_others_follow_fails(run, tmp_path):
    # Two runs in one folder would mix.
    run(4)
    for start in ("checkpoint-2", "../other/toy.checkpoints/checkpoint-2"):
        with pytest.raises(CheckpointError, match="output folder"):
            run(6, resume=str(tmp_path / "toy.checkpoints" / start))
    assert toy.steps(tmp_path) == [4, 2]


def test_resume_never_or_from_nothing_fails(run, tmp_path):
    # A new run must not mix with old checkpoints, nor begin anew by a wrong path.
    run(4)
    for resume, named in (("never", "checkpoint-4"), (str(tmp_path / "none"), "none")):
        with pytest.raises(CheckpointError, match=named):
            toy.train(tmp_path, resume=resume)
    file = tmp_path / "toy.checkpoints" / "checkpoint-4" / "data_state.json"
    file.write_text("{torn")
    with pytest.raises(CheckpointError, match=file.name):
        toy.train(tmp_path)


@pytest.mark.parametrize(
    "remains",
    [
        ".checkpoint-6.tmp",  # killed while it was written
        ".checkpoint-4.old",  # while it was removed
        "checkpoint-best",  # a user's
    ],
)
def test_remains_of_a_killed_run(run, tmp_path, remains):
    # None is resumed from half written, none is lost, none fills the disk.
    folder = tmp_path / "toy.checkpoints"
    run(4)
    shutil.copytree(folder / "checkpoint-2", folder / remains)
    assert run(5).endswith("checkpoint-4")
    assert toy.steps(tmp_path) == [5, 4, 2]
    assert (folder / remains).exists() == (not remains.startswith("."))
