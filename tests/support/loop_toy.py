"""A tiny model for the tests of the training loop; also a program: `python loop_toy.py FOLDER
'{"max_steps": 40}'`.

Under torchrun it trains with DistributedDataParallel over gloo. Every micro-step's loss goes to
FOLDER/losses.RANK.txt.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from llm_runs import environment
from safetensors.torch import load_file
from tiny import read_json
from torch import nn
from warm_processes import PYTHON
from yaml_tables import read_tables

from seed_multimodal.data.stream.order import EpochOrder
from seed_multimodal.errors import SeedError
from seed_multimodal.training.checkpoint import checkpoints
from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.task import ONE_PROCESS, StageTask
from seed_multimodal.training.trainer import train_stage


def toy_model() -> tuple[nn.Sequential, torch.Tensor]:
    """Model and data `[64, 8]`, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(64, 8)


def batch_indices(step: int, size: int = 8) -> torch.Tensor:
    """The rows of a batch."""
    samples = EpochOrder(64, 3).samples(step * size, size)
    return torch.tensor([index for _, index in samples])


def toy_loss(model, data: torch.Tensor, chosen: torch.Tensor, noise: float) -> torch.Tensor:
    """Squared error of the sum of eight numbers, with noise from the global generator."""
    x = data[chosen] + noise * torch.randn(len(chosen), 8)
    return (model(x) - x.sum(1, keepdim=True)).float().square().mean()


def move_bias(model: nn.Sequential):
    """Random change between steps, as when dead codes are restarted."""
    with torch.no_grad():
        model[2].bias.add_(0.01 * torch.randn(1))


class ToyPart:
    """A part whose numbers are given as a function, and whose state is how often it was saved."""

    restored: int | None = None
    saved = 0

    def __init__(self, status: Callable):
        self.status = status

    def state_dict(self) -> dict:
        self.saved += 1
        return {"saved": self.saved}

    def load_state_dict(self, states):
        self.restored = states[0]["saved"]


class ToyTask(StageTask):
    """A stage whose methods are given as functions; its batches are the numbers of micro-steps."""

    def __init__(
        self,
        name,
        module,
        loss: Callable[[nn.Module, int], Any],
        settings: StageSettings,
        *,
        methods: Mapping[str, Callable | None] | None = None,
        **more,
    ):
        super().__init__(name, module, settings, **more)
        for method, function in {"loss": loss, **(methods or {})}.items():
            if function is not None:
                setattr(self, method, function)

    def batch(self, micro_step: int) -> int:
        return micro_step

    def measures(self) -> dict:
        return {}

    def finish(self, run) -> dict:
        return {**super().finish(run), **self.measures()}


def train(
    folder,
    *,
    name="toy",
    pause: float = 0.0,
    noise: float = 0.1,
    frozen: bool = False,
    stop_at: int = -1,
    status: Callable[[], dict[str, float]] | None = None,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    **settings,
) -> dict:
    """Train one stage; returns its record with the exact sum of the final weights.

    Each micro-step sleeps `pause` seconds; if that is a second or more, it first makes the file
    `begun.MICRO_STEP`. In micro-step `stop_at` this process sends itself SIGTERM. `frozen`: the
    loss does not depend on the weights.
    """
    # A rank sees its own batches.
    model, data = toy_model()
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    choices = {**read_tables(__file__), **settings}
    folder.mkdir(parents=True, exist_ok=True)
    losses = folder / f"losses.{rank}.txt"

    def loss(model, micro_step) -> tuple[torch.Tensor, dict]:
        if pause >= 1:
            (folder / f"begun.{micro_step}").touch()
        time.sleep(pause)
        # A signal in the middle of a step.
        if micro_step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        chosen = batch_indices(micro_step * world + rank, choices["batch_size"])
        value = toy_loss(model, data, chosen, noise)
        if frozen:
            value = value * 0.0
        # At once, so that a killed process leaves what it did.
        with open(losses, "a") as file:
            file.write(f"{micro_step} {value.item().hex()}\n")
        return value, {"half": value.detach() / 2}

    # What a stage may do between steps: a random change, and an evaluation.
    def change(step):
        if world == 1:
            move_bias(model)

    # Equal only if every weight is, to the last bit.
    def measures() -> dict:
        return {"sum": sum(p.double().sum().item() for p in model.parameters()).hex()}

    methods = {
        "measures": measures,
        "evaluate": evaluate and (lambda run: evaluate(run.step)),
        "eval_steps": 1 if evaluate else 0,
        "after_step": change if noise else None,
        "parts": [ToyPart(status)] if status else [],
    }
    return train_stage(
        ToyTask(name, model, loss, StageSettings(**choices), methods=methods), folder
    )


def run_stage(
    name,
    module,
    loss: Callable[[int], Any],
    settings: StageSettings,
    folder,
    **more,
) -> dict:
    """Train a stage whose loss is a closure over its module."""
    settings = replace(settings, curves=False)
    return train_stage(
        ToyTask(name, module, lambda model, step: loss(step), settings, **more), folder
    )


def run_square(
    folder,
    model,
    scale: Callable[[int], float] = lambda step: 1.0,
    optimizer=None,
    **settings,
):
    """Train the mean square of a model's outputs, times `scale(step)`."""
    x = torch.ones(2, next(model.parameters()).shape[1])

    def loss(step) -> tuple[torch.Tensor, dict[str, float]]:
        return model(x).float().square().mean() * scale(step), {}

    choices = {"batch_size": 2, "warmup_steps": 1, "logging_steps": 1, **settings}
    stage = StageSettings(**choices)
    run_stage("toy", model, loss, stage, folder, optimizer=optimizer)


def newest(folder, name="toy") -> Path:
    """The newest checkpoint of a stage."""
    return checkpoints(folder / f"{name}.checkpoints")[0][1]


def saved(folder, name="toy") -> dict:
    """The newest checkpoint of a stage: `model` (averaged if the run averages), `trained`, and the
    keys of trainer_state.json and optimizer.pt."""
    path = newest(folder, name)
    trained = path / "trained.safetensors"
    return {
        "model": load_file(path / "model.safetensors"),
        "trained": load_file(trained) if trained.is_file() else {},
        **read_json(path / "trainer_state.json"),
        **torch.load(path / "optimizer.pt", weights_only=True),
    }


def content(folder) -> dict[str, bytes]:
    """Every file of the newest checkpoint."""
    return {path.name: path.read_bytes() for path in newest(folder).iterdir()}


def read_losses(folder) -> dict[int, float]:
    """The last loss of each micro-step (a killed run repeats its unsaved steps)."""
    file = folder / "losses.0.txt"
    # A line may be half written.
    pairs = [line.split() for line in file.read_text().splitlines()] if file.is_file() else []
    return {int(pair[0]): float.fromhex(pair[1]) for pair in pairs if len(pair) == 2}


def start(folder, *stages: dict, before: Sequence[str] = (PYTHON,)) -> subprocess.Popen:
    """Another process that trains the stages."""
    return subprocess.Popen(
        [*before, __file__, str(folder), *map(json.dumps, stages)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps(folder) -> list[int]:
    """Steps of the stage's checkpoints in a run's folder, newest first."""
    return [step for step, _ in checkpoints(folder / "toy.checkpoints")]


def log_lines(folder, name="toy") -> list[dict[str, float]]:
    """A stage's log."""
    return [json.loads(line) for line in (folder / f"{name}.log.jsonl").read_text().splitlines()]


def refuse_stages(folder):
    """A stage of one process only, before it waits for others; and one whose processes log
    different numbers at their second step, in other orders before."""
    model, data = toy_model()
    rank = dist.get_rank()

    def loss(model, step) -> tuple[torch.Tensor, dict[str, float]]:
        names = ["text", "image"] if rank else ["image", "text"]
        numbers = {name: float(len(name)) for name in names[: 2 - step]}
        return toy_loss(model, data, batch_indices(step), 0.0), numbers

    settings = StageSettings(max_steps=3, precision="fp32", logging_steps=1)
    single = StageTask("single", nn.Linear(1, 1), settings)
    single.ddp_options = ONE_PROCESS
    for task in (single, ToyTask("mixed", model, loss, settings)):
        try:
            train_stage(task, folder)
        except SeedError as error:
            print(f"refused: {error}", flush=True)


def main() -> int:
    """Run the stages given as JSON objects, one after the other."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        refuse_stages(Path(sys.argv[1]))
    try:
        for text in sys.argv[2:]:
            train(Path(sys.argv[1]), **json.loads(text))
    except SeedError as error:
        print(f"refused: {error}", flush=True)
        return 2
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
