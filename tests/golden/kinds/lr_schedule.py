"""Learning rates: the LLM trainer's schedules, SEED-X's loop with accumulation, the tokenizer's LAVIS schedules.

Not reproduced: the reference's TypeError for the linear kind when a floor is given; ours ends at the floor. Rates
beyond the last step are compared without the clamp that ours has by default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runner import read_json

from seed_multimodal.training.optimizers import OptimSettings, schedule
from seed_multimodal.training.schedules import epoch_rate, scheduled_rate, warmup_count

KIND = "lr_schedule"
RELATIVE = 1e-9


def check(folder: Path) -> None:
    checks = {"llm_trainer.json": check_trainer, "seedx_accumulation.json": check_accumulation,
              "tokenizer_training.json": check_tokenizer}
    found = [name for name in checks if (folder / name).is_file()]
    assert found, f"{folder}: holds none of {', '.join(checks)}"
    for name in found:
        for case in read_json(folder / name):
            checks[name](case)


def same(actual: float, wanted: float, what: str) -> None:
    assert abs(actual - wanted) <= RELATIVE * abs(wanted) + 1e-18, f"{what}: {actual!r}, expected {wanted!r}"


def check_trainer(case: dict[str, Any]) -> None:
    kind, lr, total = case.get("type", "cosine"), case["learning_rate"], case["max_steps"]
    floor = case.get("min_lr_ratio", 0.0)
    warmup = warmup_count(total, case.get("warmup_ratio", 0.0), case.get("warmup_steps", 0))
    assert warmup == case["resolved_warmup_steps"], f"{case['name']}: {warmup} warm-up steps"
    settings = OptimSettings(learning_rate=lr, lr_scheduler_type=kind, warmup_ratio=case.get("warmup_ratio", 0.0),
                             warmup_steps=case.get("warmup_steps", 0), min_lr_ratio=floor)
    for step, wanted in case.get("lr_at_step", ()):
        what = f"{case['name']}, step {step}"
        same(scheduled_rate(kind, step, lr, total, warmup=warmup, floor=floor, clamp=False), wanted, what)
        if step <= total:
            same(schedule(step, settings, total), wanted, f"{what}, from settings")
    if "error" in case:
        ends = schedule(warmup, settings, total), schedule(total, settings, total)
        assert abs(ends[0] - lr) < 1e-12 and abs(ends[1] - lr * floor) < 1e-12, f"{case['name']}: {ends}"


def check_accumulation(case: dict[str, Any]) -> None:
    micro, total = case["gradient_accumulation_steps"], case["max_steps"]
    settings = OptimSettings(learning_rate=case["learning_rate"], warmup_steps=case["warmup_steps"],
                             min_lr_ratio=case["min_lr_ratio"], schedule_per_micro_batch=True)
    for number, wanted in case["lr_used_by_optimizer_step"]:
        same(schedule(number - 1, settings, total, micro), wanted, f"accumulation {micro}, step {number}")


def check_tokenizer(case: dict[str, Any]) -> None:
    decay = case.get("lr_decay_rate", 1.0) if case["lr_sched"] == "linear_warmup_step_lr" else None
    start = case.get("warmup_lr", -1)
    for epoch, iteration, wanted in case["epoch_iter_lr"]:
        rate = epoch_rate(epoch, iteration, case["max_epoch"], case["init_lr"], case["min_lr"], decay_rate=decay,
                          warmup_lr=start if start >= 0 else None, warmup=case.get("warmup_steps", 0))
        same(rate, wanted, f"{case['name']}, epoch {epoch}, iteration {iteration}")
