"""Settings of the trainer, of a stage and of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import DataclassInstance, fraction, non_negative, positive, setting

PRECISIONS = ("bf16", "fp16", "fp32")
# Schedules, named as in transformers → settings that they do not read.
SCHEDULES: dict[str, Sequence[str]] = {
    "cosine": (),
    "cosine_with_restarts": (),
    "linear": (),
    "polynomial": (),
    "inverse_sqrt": ("min_lr_ratio",),
    "constant": ("warmup_steps", "warmup_ratio", "min_lr_ratio"),
    "constant_with_warmup": ("min_lr_ratio",),
}
DEFAULT_TIMEOUT_MINUTES = 30.0  # default of `timeout_minutes`
ConfigNode = Mapping[str, Any]  # a mapping of a resolved configuration (YAML, JSON)


def refuse_unread(
    settings: DataclassInstance, names: Sequence[str], label: str, reason: str
) -> None:
    """Raise ConfigError for one of these settings that is neither 0 nor its default.

    reason: why nothing reads them.
    """
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.name in names and value not in (0, item.default):
            raise ConfigError(
                f"{label}: {item.name} is {value}, but is not read {reason}; leave it out."
            )


def check_schedule(settings: OptimSettings | StageSettings, label: str) -> None:
    """Raise ConfigError for a setting that the chosen schedule would not read."""
    schedule = settings.lr_scheduler_type
    refuse_unread(settings, SCHEDULES[schedule], label, f"by lr_scheduler_type {schedule}")


@dataclass(kw_only=True)
class TrainerSettings:
    """Settings of all trainings, named as in transformers' `TrainingArguments` where possible.

    Attributes:
        max_steps: optimizer steps, of `gradient_accumulation_steps` micro-steps in each process.
        precision: autocast dtype; trained weights are kept in fp32.
        max_grad_norm: 0 only measures the norm.
        ema: decay of the averaged weights, which are evaluated, sampled and saved as the result (0:
            none; not with DeepSpeed).
        device, dataloader_num_workers: only for programs that use them.
        report_to: any of tensorboard and wandb; the JSON log is always written.
        curves: plot `curves.png` from the log at the end.
        save_steps: steps between checkpoints (0: off); there is also one at the end.
        save_seconds: seconds between checkpoints (0: off); next to `save_steps` only the newest of
            these is kept.
        save_total_limit: number of newest checkpoints to keep; none: all.
        save_frozen: include frozen parameters in checkpoints. A run resumes only with the same ones
            in any case.
        async_save: write checkpoints in a thread during the next steps (not with DeepSpeed).
        resume: `auto` (the newest complete checkpoint of the output folder), `never`, or a
            checkpoint's folder, from which a new output folder continues; the same command again
            resumes from this folder's own newest.
        start: a checkpoint, or a folder of them, to initialize the weights (not the optimizer)
            from.
        timeout_minutes: timeout of steps and collective operations.
    """

    max_steps: int = positive(1000)
    gradient_accumulation_steps: int = positive(1)
    precision: str = setting("bf16", choices=PRECISIONS)
    max_grad_norm: float = non_negative(1.0)
    ema: float = non_negative(0.0, below=1)
    seed: int = non_negative(42)
    device: str = "auto"
    dataloader_num_workers: int = non_negative(2)
    logging_steps: int = positive(1)
    report_to: list[str] = setting(
        factory=lambda: ["tensorboard"], choices=("tensorboard", "wandb")
    )
    run_name: str | None = None
    curves: bool = True
    save_seconds: float = non_negative(0.0)
    save_steps: int = non_negative(1000)
    save_total_limit: int | None = positive(None)
    save_frozen: bool = True
    async_save: bool = True
    resume: str = "auto"
    start: str = ""
    timeout_minutes: float = setting(DEFAULT_TIMEOUT_MINUTES, above=0)


@dataclass(kw_only=True)
class RunTrainerSettings(TrainerSettings):
    """Settings of the trainings with groups (`hydra_task.RunTask`).

    Attributes:
        sample_steps: interval of samples in `samples/` (0: never; None: `save_steps`).
    """

    sample_steps: int | None = non_negative(None)


@dataclass(kw_only=True)
class StageSettings(TrainerSettings):
    """Settings of one stage with the default schedule.

    A step has `batch_size · gradient_accumulation_steps · processes` samples. The rate warms up for
    `warmup_steps` to `learning_rate` and decays to `learning_rate · min_lr_ratio`.

    Attributes:
        optimizer: AdamW, or Muon with it (`MuonWithAdamW`).
        schedule_per_micro_batch: `warmup_steps` and the decay count micro-steps; a step has the
            rate of its last one.
        further: a completed run continues if `max_steps` was raised.
    """

    max_steps: int = non_negative()
    batch_size: int = positive(64)
    optimizer: str = setting("adamw", choices=("adamw", "muon"))
    learning_rate: float = non_negative(1e-3)
    warmup_steps: int = non_negative(100)
    min_lr_ratio: float = non_negative(0.02)
    lr_scheduler_type: str = setting("cosine", choices=tuple(SCHEDULES))
    schedule_per_micro_batch: bool = False
    weight_decay: float = non_negative(0.01)
    seed: int = non_negative(0)
    logging_steps: int = positive(50)
    report_to: list[str] = setting(factory=list, choices=("tensorboard", "wandb"))
    save_seconds: float = non_negative(60.0)
    save_steps: int = non_negative(0)
    save_total_limit: int | None = positive(1)
    async_save: bool = False
    further: bool = False


@dataclass
class OptimSettings:
    """Optimizer and learning rate; defaults are the published pretraining recipe, with weight decay
    on all trained parameters, including norms and embeddings.

    Attributes:
        name: adamw (torch, fused on CUDA), adamw_hf (the original's) or muon (see `MuonWithAdamW`;
            not with DeepSpeed).
        part_rates: peak rate by parameter name prefix, instead of `learning_rate` (names as in
            `Task.module`; LaVIT: `{causal_encoder: 1.0e-4, vit_proj: 1.0e-4}`). Not with muon. With
            `learning_rate: 0` only these parts move.
        adam_beta1, adam_beta2, adam_epsilon: of muon's AdamW, too.
        warmup_steps: if above 0, replaces `warmup_ratio` (rounded up).
        min_lr_ratio: the last step's rate over the peak.
        schedule_per_micro_batch: as in SEED-X, see `schedules.optim_learning_rate`.
    """

    name: str = setting("adamw", choices=("adamw", "adamw_hf", "muon"))
    learning_rate: float = non_negative(1.5e-4)
    part_rates: dict[str, float] = setting(factory=dict)
    adam_beta1: float = non_negative(0.9, below=1)
    adam_beta2: float = non_negative(0.95, below=1)
    adam_epsilon: float = fraction(1e-5)
    weight_decay: float = non_negative(0.05)
    lr_scheduler_type: str = setting("cosine", choices=tuple(SCHEDULES))
    warmup_ratio: float = fraction(0.03)
    warmup_steps: int = non_negative(0)
    min_lr_ratio: float = fraction(0.05)
    schedule_per_micro_batch: bool = False
