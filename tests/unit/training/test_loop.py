"""The training loop on the toy of support/loop_toy.py: equal to a plain loop, weights of batches,
precision, errors, intervals, log, warnings, other checkpoints."""

import time
from collections.abc import Sequence
from functools import partial

import loop_toy as toy
import pytest
import torch
from tiny import read_json, write_json
from torch import nn
from yaml_tables import read_tables

from seed_multimodal.data.stream.step_batches import ListedSamples, StepBatches
from seed_multimodal.disk import folder_lock
from seed_multimodal.errors import CheckpointError
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.distributed import TrainingError
from seed_multimodal.training.meters import SUMMED, TokenMeter
from seed_multimodal.training.optimizers import Ema, parameter_groups
from seed_multimodal.training.schedules import learning_rate
from seed_multimodal.training.task import Identity, StageTask
from seed_multimodal.training.trainer import micro_step_seed, train_stage

TABLES = read_tables(__file__)


def plain_loop(precision: str) -> tuple[list[float], str]:
    """The same training in plain PyTorch, twelve steps."""
    model, data = toy.toy_model()
    settings = StageSettings(max_steps=12, batch_size=8, learning_rate=1e-2, warmup_steps=5)
    optimizer = torch.optim.AdamW(
        parameter_groups(model.parameters(), 0.01), lr=1e-2, betas=(0.9, 0.99)
    )
    average = Ema(model, 0.9)
    losses = []
    for step in range(12):
        torch.manual_seed(3 * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        with torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            value = toy.toy_loss(model, data, toy.batch_indices(step), 0.1)
        losses.append(value.item())
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        toy.move_bias(model)
        average.update(model, step)  # with what the task changed
    average.swap(model)
    return losses, sum(p.double().sum().item() for p in model.parameters()).hex()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_stage_equals_a_plain_loop_bitwise(tmp_path, precision, capsys):
    # Precision, clipping, rates and averages are those of twenty lines of PyTorch.
    losses, total = plain_loop(precision)
    record = toy.train(tmp_path, precision=precision)
    assert toy.read_losses(tmp_path) == dict(enumerate(losses))
    assert record["sum"] == total
    assert (record["steps"], record["batch_size"]) == (12, 8)
    assert toy.train(tmp_path, precision=precision) == record
    assert "already done" in capsys.readouterr().out
    # A resumed run has the seeds of earlier versions.
    assert micro_step_seed(3, 7, 2) == 3_000_009 + 7 + 2 * 1_000_006_000_009


class WeightedTask(StageTask):
    """Rows of the toy's data in micro-batches of some sizes, weighted by them."""

    def __init__(self, *steps: Sequence[int], **settings):
        self.steps = steps
        self.calls = []
        settings = {"logging_steps": 1, "precision": "fp32", "curves": False, **settings}
        count = max(map(len, steps))
        stage = StageSettings(gradient_accumulation_steps=count, warmup_steps=2, **settings)
        super().__init__("toy", toy.toy_model()[0], stage)

    def prepare(self):
        self.is_prepared = True

    def batches(self, step):
        assert self.is_prepared
        sizes = self.steps[step] if step < len(self.steps) else ()
        return torch.arange(sum(sizes)).split(list(sizes)) if sizes else []

    def weight(self, batch):
        return len(batch)

    def loss(self, model, batch):
        assert model.training and torch.is_grad_enabled()
        x = toy.toy_model()[1][[] if batch is None else batch]
        return (model(x) - x.sum(1, keepdim=True)).square().sum(), {"rows": float(len(x))}

    def write_samples(self, run):
        assert not (run.model.training or torch.is_grad_enabled())
        self.calls.append(("sample", run.step))

    def evaluate(self, run):
        self.calls.append(("evaluate", run.step))
        assert not (run.model.training or torch.is_grad_enabled())
        assert run.model is self.module and run.evaluation.get("step", 0) < run.step
        return {"eval_loss": float(run.step)}


def test_losses_are_sums_over_the_weights_of_a_step(tmp_path, capsys):
    # A row counts the same in a small and in a large micro-batch, and where the data end.
    weights = []
    for name, steps in (("split", [(3, 1), (4, 2), (5,)]), ("whole", [(4,), (6,), (5,)])):
        task = WeightedTask(*steps, max_steps=9)
        task.eval_steps = 2
        assert train_stage(task, tmp_path / name)["steps"] == 3
        assert "exhausted after step 3" in capsys.readouterr().out
        assert task.calls == [("evaluate", 2), ("evaluate", 3)]
        weights.append(task.module.state_dict())
    torch.testing.assert_close(*weights)
    split, whole = (toy.log_lines(tmp_path / name) for name in ("split", "whole"))
    for line, expected in zip(split, whole, strict=True):
        numbers = {key: expected[key] for key in expected if key in ("loss", "grad", "rows")}
        assert {key: line[key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
        assert line.get("rows", 1) == 1


def test_intervals_of_evaluations_samples_checkpoints_and_log_lines(tmp_path, capsys):
    # Each once; evaluation, log and checkpoint also at the end.
    settings = {"max_steps": 8, "logging_steps": 5, "save_steps": 4, "save_total_limit": None}
    task = WeightedTask(*[(2,)] * 8, **settings)
    task.sample_steps = 4
    task.eval_steps = 3
    task.parts = [toy.ToyPart(lambda: {"bad_samples": 3, "share": 0.5})]
    assert train_stage(task, tmp_path)["bad_samples"] == 3
    evaluated = [step for call, step in task.calls if call == "evaluate"]
    assert evaluated == [3, 6, 8]
    assert [step for call, step in task.calls if call == "sample"] == [4, 8]
    # The end again makes none of them a second time.
    (tmp_path / "toy.done.json").unlink()
    task.calls.clear()
    train_stage(task, tmp_path)
    assert not task.calls
    assert toy.steps(tmp_path) == [8, 4]
    assert "is removed" not in capsys.readouterr().out  # none was written between
    lines = toy.log_lines(tmp_path)
    assert [line["step"] for line in lines if "eval_loss" in line] == evaluated
    assert [line["step"] for line in lines if "loss" in line] == [5, 8]


@pytest.mark.parametrize("case", TABLES["unchanged"], ids=str)
def test_run_that_cannot_change_anything_says_so(tmp_path, capsys, case):
    # Once: else a wrong setting looks like a finished training.
    named = case["named"]
    toy.train(tmp_path, noise=0, **case["settings"])
    output = capsys.readouterr().out
    assert output.count("warning") == bool(named and "max_steps 0" not in named)
    assert named in output


def test_fp16_skips_steps_that_overflow(tmp_path):
    # Weights do not change at such a step; the halved loss scale is saved and restored.
    model = nn.Linear(4, 1)
    weights = []

    def scale(step):
        weights.append(model.weight.detach().clone())
        return 1e30 if step == 0 else 1.0

    toy.run_square(tmp_path, model, scale, max_steps=3, precision="fp16")
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    # One infinite norm, which JSON cannot hold, is no reason to log only such.
    norms = [line["grad"] for line in toy.log_lines(tmp_path)]
    assert [norm is None for norm in norms] == [True, False, False]
    (tmp_path / "toy.done.json").unlink()
    toy.run_square(tmp_path, model, scale, max_steps=5, precision="fp16")
    assert len(weights) == 5
    assert toy.saved(tmp_path)["scaler"]["scale"] == 2.0**15
    with pytest.raises(TrainingError):  # no scale is small enough
        toy.run_square(tmp_path / "hot", model, lambda step: 1e36, max_steps=100, precision="fp16")


@pytest.mark.parametrize("bad", ["loss", "gradient", "memory"])
def test_train_stage_stops_at_a_loss_that_is_not_finite(tmp_path, bad):
    # The weights of a user's run are kept, those of the last checkpoint and those in memory.
    model = nn.Linear(3, 1, bias=False)
    before = []

    def loss(step):
        value = model(torch.ones(2, 3)).square().mean()
        if step == 5:
            before.append(model.weight.detach().clone())
            if bad == "memory":
                raise torch.OutOfMemoryError("out of memory")
            infinite_slope = (model.weight * 0).sum().sqrt()
            value = value * float("nan") if bad == "loss" else value + infinite_slope
        return value, {}

    settings = StageSettings(max_steps=9, precision="fp32", save_steps=5)
    settings.async_save = bad != "memory"
    with pytest.raises(TrainingError, match=r"step 6\b.*checkpoint-5"):
        toy.run_stage("toy", model, loss, settings, tmp_path)
    assert toy.saved(tmp_path)["global_step"] == 5
    assert torch.equal(before[0], model.weight)
    assert not (tmp_path / "toy.done.json").exists()


def test_resume_with_other_micro_batches(tmp_path):
    # The same number of samples per step is the same run.
    with pytest.raises(SystemExit):
        toy.train(tmp_path, stop_at=6)
    toy.train(tmp_path, batch_size=4, gradient_accumulation_steps=2)


def as_earlier_version(folder):
    """Checkpoints in which states of the meter, identity and parts are one mapping."""
    for file in folder.rglob("trainer_state.json"):
        state = read_json(file)
        write_json(file, {**state.pop("identity", {}), **state.pop("meter", {}), **state})
    for file in folder.rglob("data_state.json"):
        write_json(file, [state.get("parts", [state])[0] for state in read_json(file)])


def test_states_of_parts_meter_and_identity_do_not_meet(tmp_path):
    # Two data sets took each other's position, and settings of names that the trainer has, too,
    # could never be resumed.
    seen = {"resumed": [], "whole": []}
    names = "seconds config frozen smooth global_step evaluation".split()
    for name, steps in (("resumed", 3), ("resumed", 6), ("whole", 6)):
        parts = [StepBatches([ListedSamples([*range(n)])], 2, seed=0, log=None) for n in (5, 7)]
        task = WeightedTask(*[(2,)] * 6, max_steps=steps, further=True)
        task.parts = parts
        task.identity = lambda world: Identity(dict.fromkeys(names, "own"), {})

        def read(step, batches=seen[name], parts=parts):
            batches += [part.at(step - 1).tolist() for part in parts]

        task.after_step = read
        train_stage(task, tmp_path / name)
    assert seen["resumed"] == seen["whole"]


@pytest.mark.parametrize("is_old", [False, True])
def test_states_of_parts_are_restored_and_a_second_run_waits(tmp_path, is_old):
    # Positions in data; two runs in one folder would mix.
    part = toy.ToyPart(dict)
    for steps, restored in ((2, None), (2, None), (4, 1), (6, 2)):
        task = WeightedTask(*[(2,)] * steps, max_steps=steps, further=True)
        task.parts = [part]
        train_stage(task, tmp_path)
        assert part.restored == restored
        if is_old:
            as_earlier_version(tmp_path)
    start = WeightedTask(
        (2,), max_steps=1, learning_rate=0.0, start=str(tmp_path / "toy.checkpoints")
    )
    train_stage(start, tmp_path / "start")
    torch.testing.assert_close(start.module.state_dict(), task.module.state_dict())
    with folder_lock(tmp_path / "toy.checkpoints", CheckpointError, name=".run.lock"):
        with pytest.raises(CheckpointError, match="toy.checkpoints"):
            toy.train(tmp_path, max_steps=9, further=True)


@pytest.mark.parametrize("case", TABLES["refused"], ids=str)
def test_numbers_and_batches_that_are_refused(tmp_path, case):
    # A metric `step` of 6.999 decided which lines of the log a resume removes; gradients of more
    # batches than micro-steps would be of one process alone.
    task = WeightedTask((2,), max_steps=1)
    task.eval_steps = 1
    loss = task.loss
    task.loss = lambda *arguments: (loss(*arguments)[0], case.get("metrics", {}))
    task.parts = [toy.ToyPart(partial(dict, status)) for status in case.get("parts", [])]
    task.evaluate = lambda run: case.get("evaluation")
    task.batches = lambda step: [torch.arange(2)] * case.get("batches", 1)
    with pytest.raises(TrainingError, match=case["named"]):
        train_stage(task, tmp_path)


def test_token_meter_logs_what_a_subclass_adds():
    # A loss of its own, and fp16's scale; what its lines need is named where it is missing.
    meter = TokenMeter()
    sums = {**dict.fromkeys(SUMMED, 4.0), "z_loss": 6.0}
    for _ in range(2):
        meter.add(sums, 2.0, {"lr": 0.5, "grad": 1.0, "loss_scale": 8.0})
    line = meter.line(2, 1.0, 1)
    numbers = {
        "learning_rate": 0.5,
        "grad_norm": 1.0,
        "loss_scale": 8.0,
        "z_loss": 3.0,
        "loss": 2.0,
    }
    assert line | numbers == line
    del sums["text_sum"]
    with pytest.raises(TrainingError, match="must also return text_sum"):
        meter.add(sums, 1.0, {})


def test_log_lines_hold_losses_speed_and_status(tmp_path, capsys):
    # What users and dashboards read from the JSON lines and the console.
    calls = []

    def status():
        calls.append(time.monotonic())
        return {"wait_seconds": 0.25 * (calls[-1] - calls[0]), "bad_samples": 3, "perplexity": 12.5}

    toy.train(tmp_path, status=status, pause=0.01, max_steps=10, gradient_accumulation_steps=2)
    lines = toy.log_lines(tmp_path)
    assert [line["step"] for line in lines] == [4, 8, 10]
    for line in lines:
        assert line["half"] == pytest.approx(line["loss"] / 2)
        assert line["samples_per_s"] * line["seconds_per_step"] == pytest.approx(16)
        assert line["seconds_per_step"] >= 0.02
        assert line["wait_share"] == pytest.approx(0.25, abs=0.05)
        assert (line["bad_samples"], line["perplexity"]) == (3, 12.5)
        assert 20 < line["peak_memory_mib"] < 100_000
    assert lines[0]["eta_seconds"] == pytest.approx(6 * lines[0]["seconds_per_step"])
    assert lines[-1]["eta_seconds"] == 0
    # The rate of the fourth step of a warm-up over five to 1e-2.
    assert lines[0]["lr"] == pytest.approx(8e-3)
    output = capsys.readouterr().out.splitlines()
    assert len(output) == 4
    assert "4/10" in output[0] and "perplexity 12.5" in output[0]


def test_resume_drops_log_lines_after_the_checkpoint(tmp_path):
    # A curve has one value for each step, also after a kill in the middle of a line.
    with pytest.raises(SystemExit):
        toy.train(tmp_path, stop_at=6, logging_steps=1)
    log = tmp_path / "toy.log.jsonl"
    assert [line["step"] for line in toy.log_lines(tmp_path)] == list(range(1, 8))
    with open(log, "a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')  # killed while writing
    resumed = toy.train(tmp_path, logging_steps=1)
    assert [line["step"] for line in toy.log_lines(tmp_path)] == list(range(1, 13))
    assert resumed["sum"] == toy.train(tmp_path / "whole", logging_steps=1)["sum"]


def test_end_keeps_its_checkpoint_and_a_resumed_run_warns_again(tmp_path, capsys):
    settings = {"noise": 0, "frozen": True, "warmup_steps": 1, "further": True}
    for steps in (2, 4):
        toy.train(tmp_path, max_steps=steps, save_steps=5, save_seconds=1e-9, **settings)
        assert toy.saved(tmp_path)["kept"]
    assert capsys.readouterr().out.count("exactly 0 in 2 steps") == 2
