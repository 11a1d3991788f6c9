"""Contract of the training programs: each entry of support/trainers.py × start, kill, resume,
SIGTERM, full disk, two processes, another number of processes, ZeRO, use of the result.

A new trainer is tested by its entry. The suite runs one program of each framework (LAVIS, language
model under ZeRO, pixels) killed and resumed; all other combinations are `nightly`. The loop's own
properties are tested on a toy (unit/training). DeepSpeed compiles its shared-memory operator at the
first start (under a minute; needs g++ and ninja).
"""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from full_disk import file_size_limit
from lavis_runs import require_lavis
from llm_runs import compose
from real_processes import kill_when, wait_until
from trainers import HUB_LLMS, LAVIS, LLM, TRAINERS, TWO, Trainer

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(600)]
PUBLISHED = {
    2: "configs/deepspeed/stage2_bf16.json",
    3: "configs/deepspeed/stage3_offload_bf16.json",
}


def each(trainers: list[Trainer], *in_the_suite: str) -> pytest.MarkDecorator:
    """A test of these trainers: nightly, but for the named ones."""
    rows = [
        pytest.param(
            entry,
            id=entry.name,
            marks=() if entry.name in in_the_suite else pytest.mark.nightly,
        )
        for entry in trainers
    ]
    return pytest.mark.parametrize("trainer", rows)


@pytest.fixture(scope="module")
def part_folders(tmp_path_factory) -> dict[str, Path]:
    """Trainer → the folder of its parts, filled when it is first used."""
    return {"": tmp_path_factory.mktemp("trainers")}


@pytest.fixture
def parts_dir(trainer, part_folders, monkeypatch) -> Iterator[Path]:
    import torch

    if trainer.application == LAVIS:
        require_lavis()
    if trainer.name not in part_folders:
        part_folders[trainer.name] = part_folders[""] / trainer.name
        part_folders[trainer.name].mkdir()
        trainer.parts(part_folders[trainer.name])
    for name, value in trainer.variables(part_folders[trainer.name]).items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that are compared with
    yield part_folders[trainer.name]
    torch.set_num_threads(threads)


def forget_the_end(out):
    """Make a finished run of four steps one that was killed after its checkpoint of step 2."""
    for pattern in ("**/checkpoint-4", "*.done.json", "summary.json"):
        for path in list(out.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@each(TRAINERS, "stage1", "seed_x_detokenizer")
def test_trainer_killed_and_resumed_is_equal_to_the_last_bit(
    trainer, parts_dir, tmp_path, capfd, request
):
    from tensors import equal

    killed, uninterrupted = (
        trainer.arguments(parts_dir, tmp_path / name, 16, 2, ()) for name in ("killed", "whole")
    )
    saved = tmp_path / "killed"
    # At night killed three times, the second time while it writes a checkpoint.
    patterns = ["checkpoint-*", "*.tmp", "checkpoint-*"]
    if request.node.get_closest_marker("nightly") is None:
        del patterns[1:]
    for number, pattern in enumerate(patterns):
        n_steps = 4 * number + 3
        process = trainer.start(parts_dir, killed)
        kill_when(
            lambda: len(trainer.losses(saved)) >= n_steps and any(saved.rglob(pattern)),  # noqa: B023
            process,
        )
        assert n_steps <= len(trainer.losses(saved)) < 16
    capfd.readouterr()
    for arguments in (killed, uninterrupted):
        assert trainer.main(arguments) == 0
        # A run that begins anew has the same losses.
        assert ("resumes from" in capfd.readouterr().out) == (arguments is killed)
    assert list(trainer.losses(tmp_path / "whole")) == list(range(1, 17))
    assert trainer.losses(tmp_path / "killed") == trainer.losses(tmp_path / "whole")
    first, second = (trainer.result(tmp_path / name) for name in ("killed", "whole"))
    assert first.keys() == second.keys()
    assert equal(first, second)
    trainer.use(parts_dir, tmp_path / "killed")


@each([entry for entry in TRAINERS if entry.double and entry.zero != 3])
def test_trainer_in_two_processes_is_one_with_the_double_batch(trainer, parts_dir, tmp_path, capfd):
    two = trainer.arguments(parts_dir, tmp_path / "two", 4, 2, ())
    one, resumed = (
        trainer.arguments(parts_dir, tmp_path / name, 4, 2, trainer.double)
        for name in ("one", "two")
    )
    trainer.run(parts_dir, two, *TWO)
    assert trainer.main(one) == 0
    expected = pytest.approx(trainer.losses(tmp_path / "one"), rel=trainer.close)
    assert len(trainer.losses(tmp_path / "two")) == 4
    assert trainer.losses(tmp_path / "two") == expected

    # A job that gets fewer processes after a requeue continues with the same samples; the noise of
    # pixel decoders is drawn by each process, so that their losses are others. Stages keep their
    # last checkpoint only.
    if trainer.application == LAVIS:
        return
    forget_the_end(tmp_path / "two")
    capfd.readouterr()
    assert trainer.main(resumed) == 0
    assert "resumes from" in capfd.readouterr().out
    losses = trainer.losses(tmp_path / "two")
    assert len(losses) == 4
    if "decoder" not in trainer.name and "detokenizer" not in trainer.name:
        assert losses == expected


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="DeepSpeed on a CPU needs the package and g++",
)
UNDER_ZERO = [entry for entry in (*TRAINERS, *HUB_LLMS) if entry.zero]


def zero_arguments(trainer, parts_dir, out) -> list[str]:
    """A run with the published settings of DeepSpeed."""
    more = (f"deepspeed={PUBLISHED[trainer.zero]}", "trainer.timeout_minutes=5")
    return trainer.arguments(parts_dir, out, 4, 2, more)


@needs_deepspeed
@each(UNDER_ZERO, "llm")
def test_trainer_under_zero_resumes_to_the_last_bit(trainer, parts_dir, tmp_path):
    arguments = zero_arguments(trainer, parts_dir, tmp_path)
    trainer.run(parts_dir, arguments, *TWO)
    losses = trainer.losses(tmp_path)
    forget_the_end(tmp_path)
    assert "(step 2)" in trainer.run(parts_dir, arguments, *TWO)
    assert trainer.losses(tmp_path) == losses


@needs_deepspeed
@each(UNDER_ZERO)
def test_trainer_under_zero_equals_the_plain_one(trainer, parts_dir, tmp_path):
    # Checkpoints contain the gathered weights.
    import torch

    zero, plain = tmp_path / "zero", tmp_path / "plain"
    arguments = zero_arguments(trainer, parts_dir, zero)
    trainer.run(parts_dir, arguments, *TWO)
    trainer.run(parts_dir, trainer.arguments(parts_dir, plain, 4, 2, ()), *TWO)
    expected_losses = pytest.approx(trainer.losses(plain), rel=trainer.close)
    assert trainer.losses(zero) == expected_losses
    result = trainer.result(zero)
    expected = trainer.result(plain)
    assert result.keys() == expected.keys()
    for name, value in result.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-3, atol=1e-3, msg=name, check_dtype=False
        )
    if trainer.name == "seed_x_sft":
        check_conversion(trainer, arguments, zero / "checkpoint-4", result)


def check_conversion(trainer, arguments: list[str], checkpoint: Path, weights: dict):
    """What DeepSpeed's own script makes of a checkpoint, one file or shards, is an agent again."""
    import torch
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    from seed_multimodal.models.seed_x.modeling import load_agent
    from seed_multimodal.recipes.seed_x.train_agent import TuningTask
    from seed_multimodal.training.distributed import ProcessGroup

    settings = TuningTask.run_type.read(compose(arguments, name="train_seed_x_sft"))
    task = TuningTask(settings, ProcessGroup(), torch.device("cpu"))
    task.prepare()
    kinds = {"one": {}, "shards": {"max_shard_size": "40KB"}, "safe": {"safe_serialization": True}}
    for kind, options in kinds.items():
        convert_zero_checkpoint_to_fp32_state_dict(
            str(checkpoint), str(checkpoint / kind), **options
        )
        for value in task.published(task.module.state_dict()).values():
            value.data.zero_()
        load_agent(task.module, checkpoint / kind)
        for name, value in task.published(task.module.state_dict()).items():
            assert torch.equal(value, weights[f"model.{name}"]), (kind, name)


@each(TRAINERS)
def test_trainer_stopped_by_sigterm_saves_and_continues(trainer, parts_dir, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        n_steps = len(trainer.losses(out))
        process = trainer.start(parts_dir, trainer.arguments(parts_dir, out, 2000, 1000, ()))
        wait_until(lambda: len(trainer.losses(out)) >= n_steps + 3, process)  # noqa: B023
        process.terminate()
        output, complained = process.communicate(timeout=60)
        assert process.returncode == 143, output + complained
        assert not complained.strip()
        assert not n_steps or f"(step {n_steps})" in output, output
    assert list(trainer.losses(out)) == list(range(1, len(trainer.losses(out)) + 1))


# One of each framework: of stage 2 the limit would meet shared memory first.
ON_A_FULL_DISK = ("stage1", "llm", "seed_x_detokenizer")


@each([entry for entry in TRAINERS if entry.name in ON_A_FULL_DISK])
def test_trainer_on_a_full_disk_reports_it_and_continues(trainer, parts_dir, tmp_path, capsys):
    # The limit on the size of files stands for a full disk: writes fail in the same place.
    out = tmp_path / "out"
    arguments = trainer.arguments(parts_dir, out, 4, 2, ())
    with file_size_limit(10_000):
        assert trainer.main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not [path for path in out.rglob("checkpoint-*") if path.is_dir()]
    assert trainer.main(arguments) == 0
    assert len(trainer.losses(out)) == 4


def test_trainer_folders_have_every_program():
    assert {path.name for path in (LLM / "src" / "train").glob("train*.py")} == {
        Path(entry.program).name for entry in TRAINERS if entry.application == LLM
    }
