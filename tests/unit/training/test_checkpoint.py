"""Checkpoints: which are resumed from (`resume=FOLDER`: a branch of a run), which stay, damaged
ones, and a full disk."""

import re
import shutil

import loop_toy as toy
import pytest
import torch
from data_files import write
from full_disk import file_size_limit
from tiny import read_json, write_json
from torch import nn
from yaml_tables import read_tables

from seed_multimodal.errors import CheckpointError, SeedError
from seed_multimodal.training.checkpoint import CheckpointStore, settings_remark
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.distributed import ProcessGroup, TrainingError
from seed_multimodal.training.engine import Engine
from seed_multimodal.training.optimizers import parameter_groups
from seed_multimodal.training.task import StageTask
from seed_multimodal.training.zero_engine import ZeroEngine


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


TABLES = read_tables(__file__)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("case", TABLES["kept"].values(), ids=TABLES["kept"])
def test_kept_checkpoints_stay_whatever_later_settings_are(tmp_path, capsys, case, is_old):
    # With another `save_steps` those of the first run were removed, without a word.
    for max_steps, save_steps, limit in case["runs"]:
        before = toy.steps(tmp_path)
        options = {"save_steps": save_steps, "save_total_limit": limit, "further": True}
        options["save_seconds"] = 1e-9  # at every step; each is replaced by the next
        toy.train(tmp_path, max_steps=max_steps, **options)
        for file in tmp_path.rglob("trainer_state.json"):  # of an earlier version
            state = read_json(file)
            assert state.pop("kept", True)
            if is_old:
                write_json(file, state)
    assert toy.steps(tmp_path) == case["steps"]
    removed = set(before) - set(case["steps"])
    assert capsys.readouterr().out.count("is removed: save_total_limit is 2") == len(removed)


@pytest.mark.parametrize("name, content", TABLES["damage"], ids=str)
def test_damaged_checkpoint_names_the_intact_one_before_it(tmp_path, name, content):
    # Its steps are lost, those before it are not: the sentence says how to take them.
    with pytest.raises(SystemExit):
        toy.train(tmp_path, stop_at=7, save_steps=2, save_total_limit=None)
    folder = tmp_path / "toy.checkpoints"
    (folder / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    damaged = folder / "checkpoint-8"
    (damaged / name).unlink() if content is None else (damaged / name).write_text(content)
    sentence = f"{name}: .*checkpoint-4 is intact: remove {damaged} "
    with pytest.raises(CheckpointError, match=sentence):
        toy.train(tmp_path)
    shutil.rmtree(damaged)
    shutil.rmtree(folder / "checkpoint-6")
    assert toy.train(tmp_path)["steps"] == 12


def limited(folder, size, **options) -> str:
    """The error of a run whose files may have at most `size` bytes."""
    with file_size_limit(size), pytest.raises(SeedError) as caught:
        toy.train(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize("async_save", [False, True])
def test_file_size_limit_while_writing_a_checkpoint(tmp_path, async_save):
    # In the training's thread or another; the error names the step, earlier files are intact.
    options = {"save_steps": 1, "async_save": async_save}
    error = limited(tmp_path / "none", 1500, **options)
    assert "step 1 " in error
    assert not list((tmp_path / "none" / "toy.checkpoints").glob("*checkpoint-*"))
    with pytest.raises(SystemExit):
        toy.train(tmp_path, stop_at=6)
    content = toy.content(tmp_path)
    error = limited(tmp_path, len(content["optimizer.pt"]) - 1000, **options)
    assert re.search(r"step 8\b.*checkpoint-7\)", error)
    assert toy.content(tmp_path) == content


def test_file_size_limit_while_writing_the_log(tmp_path):
    # A quota that is full ends the run with the name of the file.
    error = limited(tmp_path, 6000, logging_steps=1, max_steps=100)
    assert "toy.log.jsonl" in error
    assert not (tmp_path / "toy.done.json").exists()


def wide(model: nn.Sequential) -> dict:
    return {"model": nn.Sequential(nn.Linear(8, 17), nn.Tanh(), nn.Linear(17, 1))}


def frozen(model: nn.Sequential) -> dict:
    optimizer = torch.optim.AdamW(parameter_groups(model.parameters(), 0.0))
    model[0].bias.requires_grad_(False)
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize(
    "change, settings, named",
    [
        (None, {"batch_size": 16}, "16"),
        (None, {"gradient_accumulation_steps": 3}, "24"),
        (wide, {}, "0.weight"),
        (frozen, {}, "trained"),
    ],
    ids=["batch", "accumulation", "sizes", "frozen"],
)
def test_resume_from_the_checkpoint_of_another_run_fails(tmp_path, change, settings, named):
    # By the name of what differs, and the files stay as they are.
    with pytest.raises(SystemExit):
        toy.train(tmp_path, stop_at=6)
    content = toy.content(tmp_path)
    with pytest.raises(CheckpointError, match=named):
        if change is None:
            toy.train(tmp_path, **settings)
        else:
            options = {"max_steps": 8, "batch_size": 8, "ema": 0.9}
            toy.run_square(tmp_path, **change(toy.toy_model()[0]), **options)
    assert toy.content(tmp_path) == content


def test_checkpoints_without_frozen_weights(tmp_path):
    # Frozen weights of hundreds of millions of parameters are in their own files.
    def run(name, seed, steps, **settings):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        model[0].requires_grad_(False)
        folder = tmp_path / name
        toy.run_square(folder, model, max_steps=steps, precision="fp32", **settings)
        return set(toy.saved(folder)["model"])

    saved = run("first", 0, 3, save_frozen=False)
    assert {name.partition(".")[0] for name in saved} == {"1", "2"}
    for name in ("same", "other"):
        shutil.copytree(tmp_path / "first", tmp_path / name)
        (tmp_path / name / "toy.done.json").unlink()
    assert "0.weight" in run("same", 0, 5, save_frozen=True)
    with pytest.raises(CheckpointError, match="frozen"):
        run("other", 7, 6, save_frozen=False)


def test_warm_start_loads_averaged_weights(tmp_path):
    # Those that the first stage was judged by.
    settings = {"max_steps": 3, "precision": "fp32", "ema": 0.5}
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    toy.run_square(tmp_path / "first", first, **settings)
    settings["start"] = str(tmp_path / "first" / "toy.checkpoints")
    toy.run_square(tmp_path / "second", second, learning_rate=0.0, **settings)
    torch.testing.assert_close(second.weight, first.weight)
    for model, start in ((nn.Linear(3, 4), settings["start"]), (second, str(tmp_path))):
        with pytest.raises(CheckpointError):
            toy.run_square(tmp_path / "third", model, **{**settings, "start": start})


@pytest.mark.parametrize("async_save", [False, True])
def test_save_in_the_background_or_not(tmp_path, async_save):
    settings = StageSettings(max_steps=1, async_save=async_save)
    task = StageTask("toy", nn.Linear(2, 2), settings)
    group = ProcessGroup()
    engine = Engine(task, group, torch.device("cpu"))
    store = CheckpointStore(tmp_path / "new", group, settings, print)
    store.save(1, task, engine, None, {}, {})
    assert store.last_step == (None if async_save else 1)
    store.wait()
    assert store.last_step == 1 and store.writing is None
    # A folder that cannot be made is an error with its reason, and nothing more to finish.
    store.folder = tmp_path / "new" / "checkpoint-1" / "optimizer.pt"
    with pytest.raises(
        TrainingError, match=r"step 2 cannot be written: .*checkpoint-1\) is intact"
    ):
        store.save(2, task, engine, None, {}, {})
        store.wait()
    store.wait()
    assert store.last_step == 1


class Sharded(ZeroEngine):
    """Writes some shards."""

    def __init__(self, n_shards: int) -> None:
        self.n_shards = n_shards

    def save_shards(self, folder, step) -> None:
        for rank in range(self.n_shards):
            write(folder / f"global_step{step}" / f"{rank}_optim_states.pt", "")

    def weights(self) -> dict:
        return {"weight": torch.ones(2)}


def test_save_shards_of_all_processes(tmp_path):
    # A node with a disk of its own has written elsewhere.
    settings = StageSettings(max_steps=1)
    store = CheckpointStore(tmp_path, ProcessGroup(), settings, print)
    task = StageTask("toy", nn.Linear(2, 2), settings)
    store.save(1, task, Sharded(1), None, {}, {})
    assert store.last_step == 1 and (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
    with pytest.raises(TrainingError, match="shards of 0 of 1 processes"):
        store.save(2, task, Sharded(0), None, {}, {})


@pytest.mark.parametrize("case", TABLES["remarks"], ids=str)
def test_settings_remark(case):
    remark = case["remark"]
    text = settings_remark(case["saved"], case["current"], ["quiet"])
    assert text.endswith(remark) and bool(text) == bool(remark)
