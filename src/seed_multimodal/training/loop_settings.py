"""How long, how fast and how exactly one stage trains: the typed settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass

from seed_multimodal.errors import ConfigError

PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass
class StageSettings:
    """Settings of one stage; `steps` counts optimiser steps of `batch_size · accumulate · processes` samples.

    The state is saved every `save_seconds` seconds, every `save_every_steps` steps (0: by seconds only) and at the
    end. `clip` is the largest gradient norm (0: measured, not clipped). `start` is the `NAME.state.pt` of an earlier
    run whose weights (not its optimiser) the first step starts from. With `save_frozen=False` the state leaves out
    parameters that are not trained; the caller then builds them again, from the same files, before a resume. With
    `further` a stage that is done, with fewer steps and its state still there, goes on from that state.
    """

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    warmup: int = 100
    min_lr_ratio: float = 0.02
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    precision: str = "bf16"
    seed: int = 0
    save_seconds: float = 60.0
    log_every: int = 50
    start: str = ""
    accumulate: int = 1
    save_every_steps: int = 0
    save_frozen: bool = True
    tensorboard: bool = False
    further: bool = False


@dataclass(frozen=True)
class SampleCost:
    """What a sample costs, for the log's `tflops` and `mfu`, both of one process's device.

    `flops`: operations of one sample through one step, forward and backward. `peak_tflops`: what the device reaches at
    most (`peaks.known_peak`), if that is known.
    """

    flops: float
    peak_tflops: float | None = None


def check_settings(name: str, settings: StageSettings) -> None:
    """Refuse settings that no run can follow.

    Raises:
        ConfigError: an unknown precision, or a count below its smallest value.
    """
    if settings.precision not in PRECISIONS:
        raise ConfigError(f"[{name}] precision must be one of {', '.join(PRECISIONS)}, not {settings.precision!r}.")
    for key, least in (("steps", 0), ("batch_size", 1), ("accumulate", 1), ("log_every", 1), ("save_every_steps", 0)):
        if getattr(settings, key) < least:
            raise ConfigError(f"[{name}] {key} must be at least {least}, not {getattr(settings, key)}.")
    if not settings.clip >= 0.0:  # also NaN; a negative one would turn the gradients round
        raise ConfigError(f"[{name}] clip must be at least 0 (no clipping), not {settings.clip}.")
    if not 0.0 <= settings.ema < 1.0:
        raise ConfigError(f"[{name}] ema must be at least 0 (no average) and below 1, not {settings.ema}.")
