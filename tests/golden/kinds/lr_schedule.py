"""Learning rates: the LLM trainer's schedules, SEED-X's loop with accumulation, LAVIS's schedules
of the tokenizers.

Not compared: the original's TypeError for the linear schedule with a floor (here it ends at the
floor). Rates beyond the last step are compared without the default clamp.
"""

import sys
from pathlib import Path

import torch
from runner import assert_close, assert_same

from seed_multimodal.training.config import OptimSettings
from seed_multimodal.training.schedules import optim_learning_rate, scheduled_rate, warmup_count

CLOSE = 1e-18, 1e-9  # absolute, relative


def check(recording):
    # Recorded table → the check of each of its rows.
    checks = {
        "llm_trainer.json": check_trainer,
        "seedx_accumulation.json": check_accumulation,
        "tokenizer_training.json": check_tokenizer,
    }
    for name, check_case in checks.items():
        for case in recording.json(name):
            check_case(case)


def check_trainer(case):
    lr = case["learning_rate"]
    total = case["max_steps"]
    name = case["name"]
    arguments = {
        key: case[key] for key in ("warmup_ratio", "warmup_steps", "min_lr_ratio") if key in case
    }
    settings = OptimSettings(
        learning_rate=lr,
        lr_scheduler_type=case.get("type", "cosine"),
        **{"warmup_ratio": 0.0, "min_lr_ratio": 0.0, **arguments},
    )
    kind = settings.lr_scheduler_type
    floor = settings.min_lr_ratio
    warmup = warmup_count(total, settings.warmup_ratio, settings.warmup_steps)
    assert_same(warmup, case["resolved_warmup_steps"], f"{name}: warm-up steps")
    # The schedule by itself goes on behind the last step, a run's rate does not.
    for step, wanted in case.get("lr_at_step", ()):
        rate = scheduled_rate(kind, step, lr, total, warmup=warmup, floor=floor, clamp=False)
        assert_close(rate, wanted, *CLOSE, f"{name}, step {step}")
        if step <= total:
            assert_close(
                optim_learning_rate(step, settings, total),
                wanted,
                *CLOSE,
                f"{name}, step {step}, from settings",
            )
    if "error" in case:  # of the original, for a linear schedule with a floor
        ends = (optim_learning_rate(step, settings, total) for step in (warmup, total))
        assert_close([*ends], [lr, lr * floor], 1e-12, what=name)


def check_accumulation(case):
    micro = case["gradient_accumulation_steps"]
    total = case["max_steps"]
    settings = OptimSettings(
        learning_rate=case["learning_rate"],
        warmup_steps=case["warmup_steps"],
        min_lr_ratio=case["min_lr_ratio"],
        schedule_per_micro_batch=True,
    )
    # Step n is made with the rate that n - 1 calls have set.
    for step, wanted in case["lr_used_by_optimizer_step"]:
        rate = optim_learning_rate(step - 1, settings, total, micro)
        assert_close(rate, wanted, *CLOSE, f"accumulation {micro}, step {step}")


def check_tokenizer(case):
    # LAVIS's schedules are those of the application, by their registered names.
    sys.path.append(str(Path(__file__).resolve().parents[3] / "SEED_Tokenizer"))
    from seed_lavis.compat import registry

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = registry.get_lr_scheduler_class(case["lr_sched"])(
        optimizer,
        case["max_epoch"],
        case["min_lr"],
        case["init_lr"],
        decay_rate=case.get("lr_decay_rate", 1.0),
        warmup_start_lr=case.get("warmup_lr", -1),
        warmup_steps=case.get("warmup_steps", 0),
    )
    for epoch, iteration, wanted in case["epoch_iter_lr"]:
        schedule.step(epoch, iteration)
        rate = optimizer.param_groups[0]["lr"]
        assert_close(rate, wanted, *CLOSE, f"{case['name']}, epoch {epoch}, iteration {iteration}")


KINDS = {"lr_schedule": check}
