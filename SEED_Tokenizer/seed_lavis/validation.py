"""Mean losses and codebook usage over a held-out split, during training and by evaluate.py.

Every process takes its share and the sums are added up. The model's mode and its data of the last batch are restored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from seed_lavis.datasets import split_of, to_device
from seed_multimodal.data.stream.loader import StepBatches
from seed_multimodal.errors import ConfigError
from seed_multimodal.training.codebook import codebook_use, evaluation_mode

REMEMBERED = ("latest", "codes", "features")  # attributes that `forward` leaves on the models


def share_out(total: int, batch_size: int, world: int = 1, most: int = 0) -> tuple[int, int]:
    """Size and number of each process's batches: equal ones of at most `batch_size`, at most `most` (0: any number).

    Fewer images are left over than there are batches. Equal, because a contrast depends on how many are compared.
    """
    count = max(1, min(-(-total // (batch_size * world)), total // world))  # a batch has at least one image
    return total // (count * world), min(count, most) if most else count


def mean_losses(runner: Any, split: str, most: int = 0) -> dict[str, float]:
    """Mean of every loss over a split, and `codebook_used` and `perplexity` of all its codes; `samples` were looked at.

    All processes must call it and get the same result; `most`: batches of each process (0: all).
    """
    data, model, options = split_of(runner.datasets, [f"{split}:eval"]), runner.model, runner.options
    if len(data) < runner.world:
        raise ConfigError(f"Split {split!r} has {len(data)} images, too few for {runner.world} processes.")
    size, count = share_out(len(data), options.batch_size_eval, runner.world, most)
    dtype = torch.float16 if runner.precision == "fp16" else torch.bfloat16
    sums: dict[str, torch.Tensor] = {}
    number = model.quantize.size if hasattr(model, "quantize") else 0
    codes = torch.zeros(number, dtype=torch.long, device=runner.device)
    before = {name: getattr(model, name) for name in REMEMBERED if hasattr(model, name)}
    with (evaluation_mode(model),
          StepBatches(data, size, seed=0, rank=runner.rank, world=runner.world,
                      workers=min(options.num_workers, count), shuffle=False) as batches):
        for step in range(count):
            with torch.autocast(runner.device.type, dtype, enabled=runner.precision != "fp32"):
                output = model(to_device(batches.at(step), runner.device))
            for name, value in output.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float()
            if getattr(model, "codes", None) is not None:
                codes += torch.bincount(model.codes.flatten(), minlength=len(codes))
        bad = len(batches.bad_samples())
    for name, value in before.items():
        setattr(model, name, value)
    names = sorted(sums)
    values = torch.stack([sums[name] for name in names])
    if runner.world > 1:
        for total in (values, codes) if len(codes) else (values,):
            dist.all_reduce(total)
    means = {name: float(value) / (count * runner.world) for name, value in zip(names, values, strict=True)}
    return {"samples": count * size * runner.world, **means, **codebook_use(codes), "bad_samples": bad}
