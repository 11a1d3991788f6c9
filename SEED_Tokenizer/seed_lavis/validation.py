"""Mean losses and codebook usage over a held-out split, during training and by evaluate.py.

Every process takes its share and the sums are added up. Evaluation does not change the training: the model's mode and
its data of the last batch are restored (random numbers are seeded at every micro-step anyway).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from seed_lavis.datasets import to_device
from seed_multimodal.data.stream.step_batches import StepBatches
from seed_multimodal.errors import ConfigError
from seed_multimodal.training.codebook import codebook_use, evaluation_mode

REMEMBERED = ("latest", "codes", "features")  # attributes that `forward` leaves on our models


def share_out(total: int, batch_size: int, world: int = 1, most: int = 0) -> tuple[int, int]:
    """Size and number of each process's batches: equal ones of at most `batch_size`, at most `most` (0: any number).

    Fewer pictures are left over than there are batches. Equal, because a contrast depends on how many are compared.
    """
    count = max(1, min(-(-total // (batch_size * world)), total // world))  # a batch has at least one picture
    return total // (count * world), min(count, most) if most else count


@contextlib.contextmanager
def preserving_state(model: Any) -> Iterator[None]:
    """Evaluation mode inside; afterwards the model's mode and attributes are restored."""
    kept = {name: getattr(model, name) for name in REMEMBERED if hasattr(model, name)}
    try:
        with evaluation_mode(model):
            yield
    finally:
        for name, value in kept.items():
            setattr(model, name, value)


def mean_losses(model: Any, data: Any, *, batch_size: int, device: torch.device, precision: str = "fp32",
                workers: int = 0, most: int = 0, where: str = "the split") -> dict[str, float]:
    """Mean of every loss over `data`, and `codebook_used` and `perplexity` of all its codes; `samples` were looked at.

    Args:
        model: one of ours on `device`, not wrapped; all processes must call it and get the same result.
        most: batches of each process (0: all).

    Raises:
        ConfigError: fewer samples than processes.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    if len(data) < world:
        raise ConfigError(f"{where} has {len(data)} pictures, too few for {world} processes.")
    size, count = share_out(len(data), batch_size, world, most)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    sums: dict[str, torch.Tensor] = {}
    codes = None
    with (preserving_state(model), StepBatches(data, size, seed=0, rank=rank, world=world, workers=min(workers, count),
                                          shuffle=False) as batches):
        for step in range(count):
            with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
                output = model(to_device(batches.at(step), device))
            for name, value in output.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float()
            if getattr(model, "codes", None) is not None:
                seen = torch.bincount(model.codes.flatten(), minlength=model.quantize.size)
                codes = seen if codes is None else codes + seen
        bad = len(batches.bad_samples())
    names = sorted(sums)
    values = torch.stack([sums[name] for name in names])
    if world > 1:
        for total in (values, *([] if codes is None else [codes])):
            dist.all_reduce(total)
    means = {name: float(value) / (count * world) for name, value in zip(names, values, strict=True)}
    return {"samples": count * size * world, **means, **({} if codes is None else codebook_use(codes)),
            "bad_samples": bad}
