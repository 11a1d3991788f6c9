"""Every trainer as a program: killed, stopped, out of disk, in two processes, under DeepSpeed's
ZeRO.

| | killed | two processes | ZeRO-2 | ZeRO-3 | SIGTERM | full disk |
| --- | --- | --- | --- | --- | --- | --- |
| SEED_Tokenizer: stage1, stage2, LaVIT's | each | stage1 | | | stage1 | stage1 |
| MultiModalLLM: llm, seed_x_sft, lavit | each | each | llm (tests/golden/parity) | each | llm | llm
|
| decoders of SEED, SEED-X and LaVIT | each | each | SEED-X's | | SEED-X's | SEED-X's |

Under ZeRO-3 the language model is a Qwen 3, too.
DeepSpeed compiles its shared-memory operator at the first start (under a minute; needs g++ and
ninja).
"""

from __future__ import annotations

import importlib.util
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from real_processes import kill_when, wait_until
from tensors import equal
from trainers import HUB_LLMS, LAVIS, LLM, TRAINERS, TWO, Trainer

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(600)]
ONE_OF_EACH = [entry for entry in TRAINERS if entry.name in ("stage1", "llm", "seed_x_detokenizer")]
PUBLISHED = {
    2: "configs/deepspeed/stage2_bf16.json",
    3: "configs/deepspeed/stage3_offload_bf16.json",
}


@pytest.fixture(scope="module")
def part_folders(tmp_path_factory) -> dict[str, Path]:
    """Trainer → the folder of its parts, filled when it is first used."""
    return {"": tmp_path_factory.mktemp("trainers")}


@pytest.fixture
def parts_dir(trainer: Trainer, part_folders: dict[str, Path], monkeypatch) -> Iterator[Path]:
    if trainer.application == LAVIS and importlib.util.find_spec("lavis") is None:
        pytest.skip("salesforce-lavis is not installed: bash install.sh --lavis")
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


def each(trainers: list[Trainer]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("trainer", trainers, ids=lambda entry: entry.name)


@each(TRAINERS)
def test_trainer_killed_and_resumed_is_equal_to_the_last_bit(
    trainer: Trainer, parts_dir: Path, tmp_path
):
    killed, uninterrupted = (
        trainer.arguments(parts_dir, tmp_path / name, 12, 2, ()) for name in ("killed", "whole")
    )
    process = trainer.start(parts_dir, killed)
    kill_when(lambda: len(trainer.losses(tmp_path / "killed")) >= 3, process)
    assert 3 <= len(trainer.losses(tmp_path / "killed")) < 12
    for arguments in (killed, uninterrupted):
        assert trainer.main(arguments) == 0
    assert list(trainer.losses(tmp_path / "whole")) == list(range(1, 13))
    assert trainer.losses(tmp_path / "killed") == trainer.losses(tmp_path / "whole")
    first, second = (trainer.result(tmp_path / name) for name in ("killed", "whole"))
    assert first.keys() == second.keys() and equal(first, second)


@each([entry for entry in TRAINERS if entry.double and 3 not in entry.zero])
def test_trainer_in_two_processes_is_one_with_the_double_batch(
    trainer: Trainer, parts_dir: Path, tmp_path
):
    trainer.run(parts_dir, trainer.arguments(parts_dir, tmp_path / "two", 4, 100, ()), *TWO)
    assert trainer.main(trainer.arguments(parts_dir, tmp_path / "one", 4, 100, trainer.double)) == 0
    assert len(trainer.losses(tmp_path / "two")) == 4
    assert trainer.losses(tmp_path / "two") == pytest.approx(
        trainer.losses(tmp_path / "one"), rel=trainer.close
    )


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="DeepSpeed on a CPU needs the package and g++",
)
@pytest.mark.parametrize(
    ("trainer", "stage"),
    [(entry, stage) for entry in (*TRAINERS, *HUB_LLMS) for stage in entry.zero],
    ids=lambda value: getattr(value, "name", f"stage{value}"),
)
def test_trainer_under_zero_equals_the_plain_one_and_resumes(
    trainer, stage, parts_dir: Path, tmp_path
):
    """With the published settings in two processes, compared with the same run without DeepSpeed;
    checkpoints contain the gathered weights."""
    out = tmp_path / "zero"
    more = (f"deepspeed={PUBLISHED[stage]}", "trainer.timeout_minutes=5")
    arguments = trainer.arguments(parts_dir, out, 4, 2, more)
    trainer.run(parts_dir, arguments, *TWO)
    losses = trainer.losses(out)
    shutil.rmtree(out / "checkpoint-4")
    assert "(step 2)" in trainer.run(parts_dir, arguments, *TWO)
    assert trainer.losses(out) == losses
    plain = tmp_path / "plain"
    trainer.run(parts_dir, trainer.arguments(parts_dir, plain, 4, 2, ()), *TWO)
    assert losses == pytest.approx(trainer.losses(plain), rel=trainer.close)
    result = trainer.result(out)
    expected = trainer.result(plain)
    assert result.keys() == expected.keys()
    for name, value in result.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-3, atol=1e-3, msg=name, check_dtype=False
        )
    if trainer.name == "seed_x_sft":
        check_conversion(trainer, arguments, out / "checkpoint-4", result)


def check_conversion(
    trainer: Trainer, arguments: list[str], checkpoint: Path, weights: dict[str, torch.Tensor]
) -> None:
    """What DeepSpeed's own script makes of a checkpoint, one file or shards, is an agent again."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    from seed_multimodal.models.seed_x.modeling import load_agent
    from seed_multimodal.models.seed_x.train_agent import TuningTask
    from seed_multimodal.training.cli import compose, parse
    from seed_multimodal.training.distributed import ProcessGroup

    settings = TuningTask.read(compose(parse(arguments), LLM / "configs", "train_seed_x_sft"))
    task = TuningTask(settings, ProcessGroup(), torch.device("cpu"))
    task.prepare()
    kinds = {"one": {}, "shards": {"max_shard_size": "40KB"}, "safe": {"safe_serialization": True}}
    for kind, options in kinds.items():
        convert_zero_checkpoint_to_fp32_state_dict(
            str(checkpoint), str(checkpoint / kind), **options
        )
        for value in task.weights().values():
            value.data.zero_()
        load_agent(task.module, checkpoint / kind)
        assert all(
            torch.equal(value, weights[f"model.{name}"]) for name, value in task.weights().items()
        ), kind


@each(ONE_OF_EACH)
def test_trainer_stopped_by_sigterm_saves_and_continues(
    trainer: Trainer, parts_dir: Path, tmp_path
):
    out = tmp_path / "out"
    for _ in range(2):
        n_steps = len(trainer.losses(out))
        process = trainer.start(parts_dir, trainer.arguments(parts_dir, out, 2000, 1000, ()))
        wait_until(lambda: len(trainer.losses(out)) >= n_steps + 3, process)  # noqa: B023
        process.terminate()
        output, complained = process.communicate(timeout=60)
        assert process.returncode == 143 and not complained.strip(), output + complained
        assert "the same command resumes from" in output and (
            not n_steps or f"(step {n_steps})" in output
        ), output
    assert list(trainer.losses(out)) == list(range(1, len(trainer.losses(out)) + 1))


@each(ONE_OF_EACH)
def test_trainer_on_a_full_disk_reports_it_and_continues(
    trainer: Trainer, parts_dir: Path, tmp_path, capsys
):
    """The limit on the size of files stands for a disk without room: writes fail in the same
    place."""
    out = tmp_path / "out"
    arguments = trainer.arguments(parts_dir, tmp_path / "out", 4, 2, ())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        assert trainer.main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert "the disk or quota is full" in error and "Traceback" not in error
    assert not [path for path in out.rglob("checkpoint-*") if path.is_dir()]
    assert trainer.main(arguments) == 0 and len(trainer.losses(out)) == 4


def test_trainer_folders_have_every_program():
    assert {path.name for path in (LLM / "src" / "train").glob("train*.py")} == {
        Path(entry.program).name for entry in TRAINERS if entry.application == LLM
    }
