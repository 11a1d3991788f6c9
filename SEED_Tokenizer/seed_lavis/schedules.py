"""Learning-rate schedules beside LAVIS's own, by iteration and not by epoch: linear warm-up, then a cosine
(`linear_warmup_cosine_steps`) or any schedule that has a name of transformers' `SchedulerType`."""

from __future__ import annotations

from typing import Any

import torch

from seed_lavis.compat import registry
from seed_multimodal.training.config import StageConfig
from seed_multimodal.training.schedules import USABLE, check_kind, learning_rate


class StepSchedule:
    """`training.schedules.learning_rate` over all iterations of the run; called as LAVIS's schedules are."""

    kind = "cosine"

    def __init__(self, optimizer: torch.optim.Optimizer, max_epoch: int, min_lr: float, init_lr: float,
                 warmup_steps: int = 0, **_: Any) -> None:
        run = registry.get("configuration").run_cfg
        options = dict(run.get("lr_scheduler_kwargs") or {})
        check_kind(self.kind, options)
        self.optimizer, self.iterations = optimizer, int(run.iters_per_epoch)
        self.settings = StageConfig(
            max_steps=max_epoch * self.iterations, learning_rate=init_lr, warmup_steps=warmup_steps,
            min_lr_ratio=min_lr / init_lr if init_lr else 0.0, lr_scheduler_type=self.kind, lr_scheduler_kwargs=options)

    def step(self, cur_epoch: int, cur_step: int) -> None:
        """Set the rate of iteration `cur_step` of epoch `cur_epoch`."""
        rate = learning_rate(cur_epoch * self.iterations + cur_step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate


for _name, _kind in {"linear_warmup_cosine_steps": "cosine", **{kind: kind for kind in USABLE}}.items():
    registry.register_lr_scheduler(_name)(type(f"Steps_{_name}", (StepSchedule,), {"kind": _kind}))
