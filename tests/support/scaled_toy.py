"""A linear layer with a floating buffer, for tests of the training engines; also in two
processes."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from seed_multimodal.training.config import StageSettings
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.engine import Engine
from seed_multimodal.training.task import StageTask

SETTINGS = StageSettings(max_steps=4, batch_size=2, learning_rate=1e-2, precision="fp32")


class Scaled(nn.Module):
    """A linear layer and a floating buffer, which bf16 rounds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.register_buffer(
            "frequencies", torch.tensor([0.86596, 0.74989, 0.1, 1.0]), persistent=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * self.frequencies.to(x.dtype)).float().square().mean()


def task_of(module: nn.Module) -> StageTask:
    return StageTask("scaled", module, SETTINGS)


def unequal_passes(rank: int, folder: str) -> None:
    """A process that makes rank + 1 forward passes in one micro-step."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    engine = Engine(task_of(Scaled()), SETTINGS, ProcessGroup(0.5), torch.device("cpu"))
    x = torch.arange(8.0).view(2, 4)
    loss = torch.stack([engine.model(x * (index + 1)) for index in range(rank + 1)]).sum()
    engine.backward(loss, last=True)
    torch.save(engine.module.layer.weight.grad, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
