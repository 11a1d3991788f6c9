"""Six numbers become two under ZeRO; as a program, `python zero_toy.py FOLDER STAGE 4:0:3 3:3:6`,
trained by 4 processes from step 0 to 3, then by 3 from the checkpoint of step 3 to 6.

Each step has the same twelve rows in any number of processes. A checkpoint is saved after each.
"""

import json
import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.engine import Engine
from seed_multimodal.training.task import StageTask
from seed_multimodal.training.zero_engine import ZeroEngine, resolve_deepspeed_config

ROWS = 12
SETTINGS = StageSettings(max_steps=8, weight_decay=0.1, precision="fp32")


def engine(stage: int, world: int = 1) -> Engine:
    """An engine of a small network, in which one layer is frozen; stage 0: without DeepSpeed.

    Groups, their parts and their weight decay differ: a small `sub_group_size` cuts ZeRO-3's.
    """
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 2)
    )
    module[2].requires_grad_(False)
    task = StageTask("toy", module, SETTINGS)
    group, device = ProcessGroup(), torch.device("cpu")
    if not stage:
        return Engine(task, group, device)
    config = {"zero_optimization": {"stage": stage, "sub_group_size": 30}}
    task.deepspeed, _ = resolve_deepspeed_config(
        config, SETTINGS, world=world, rows=ROWS // world, hidden_size=4
    )
    return ZeroEngine(task, group, device)


def train(engine: Engine, step: int) -> float:
    """Make a step; returns the loss of all rows."""
    group = engine.group
    rows = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))
    engine.set_learning_rate(0.01)
    loss = engine.model(rows.chunk(group.world)[group.rank]).square().sum() / ROWS
    engine.backward(loss * group.world, last=True)
    engine.clip()
    engine.update()
    return group.sum([loss.item()])[0]


def process(rank: int, world: int, folder: Path, stage: int, first: int, last: int):
    """One of the processes of a run, which starts from its shards of step `first`, if that is
    not 0."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting.{first}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    toy = engine(stage, world)
    if first:
        toy.load(folder, first)
    for step in range(first, last):
        loss = train(toy, step)
        toy.save_shards(folder, step + 1)
        if not rank:
            with open(folder / "losses.jsonl", "a") as file:
                file.write(json.dumps(loss) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    import deepspeed  # noqa: F401 - once, for all processes

    fork = multiprocessing.get_context("fork")
    for run in sys.argv[3:]:
        world, first, last = map(int, run.split(":"))
        arguments = (world, Path(sys.argv[1]), int(sys.argv[2]), first, last)
        started = [fork.Process(target=process, args=(rank, *arguments)) for rank in range(world)]
        for child in started:
            child.start()
        for child in started:
            child.join()
        if any(child.exitcode for child in started):
            sys.exit(1)
