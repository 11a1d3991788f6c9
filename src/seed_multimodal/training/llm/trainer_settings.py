"""How long, how exactly and where a language model trains: the typed settings behind `configs/trainer/*.yaml`.

Keys bear the names of the original's command line (transformers' `TrainingArguments`) where it has them. Unknown keys
are refused with the nearest known one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from seed_multimodal.config import find_target
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_keys

PRECISIONS = ("bf16", "fp16", "fp32")
AVERAGES = (None, "tokens", "batch")
REPORTS = ("tensorboard", "wandb")
TOKENIZER_TARGET = "seed_multimodal.configured"
KEYS = ("output_dir", "model", "data", "optim", "trainer", "deepspeed", "tokenizer", "eval_data")


@dataclass
class TrainerSettings:
    """Settings of the loop; counts are optimiser steps unless said otherwise.

    Attributes:
        precision: what products are computed in; trained weights are kept in fp32 beside it.
        loss_average: `tokens`: the mean over all learned tokens of a step, of all processes and micro-steps; `batch`:
            the mean of the micro-batches' means, as released. By default `tokens` for packed data, else `batch`.
        text_weight, image_weight: weights of text and image tokens in the loss.
        loss_kernel: `auto`, `plain`, `chunked` or `liger`.
        max_grad_norm: 0 measures the norm only.
        dataloader_num_workers: data processes per training process.
        report_to: any of tensorboard and wandb; the JSON log is always written.
        save_steps: 0 saves at the end only.
        save_total_limit: checkpoints kept, the newest first; none deletes nothing.
        async_save: write checkpoints beside the training (plain engine).
        resume: `auto` (the newest complete checkpoint of the output folder), `never`, or a checkpoint's folder.
        eval_steps: 0 never evaluates; eval_batches: micro-batches of the evaluation mixture per process.
        timeout_minutes: how long one step may wait for another process; 0 waits for ever.
        peak_tflops: of one device at this precision, for the MFU; known devices need none.
        gradient_checkpointing, compile: override the model's settings if given.
        cpu_adam: DeepSpeed's own CPU optimiser for offloaded states (compiles for a minute at its first use).
    """

    max_steps: int = 1000
    gradient_accumulation_steps: int = 1
    precision: str = "bf16"
    max_grad_norm: float = 1.0
    loss_average: str | None = None
    loss_kernel: str = "auto"
    text_weight: float = 1.0
    image_weight: float = 1.0
    seed: int = 42
    device: str = "auto"
    dataloader_num_workers: int = 2
    logging_steps: int = 1
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    run_name: str | None = None
    save_steps: int = 1000
    save_total_limit: int | None = None
    async_save: bool = True
    resume: str = "auto"
    eval_steps: int = 0
    eval_batches: int = 16
    timeout_minutes: float = 30.0
    peak_tflops: float | None = None
    gradient_checkpointing: bool | str | None = None
    compile: bool | None = None
    cpu_adam: bool = False


@dataclass
class RunSettings:
    """A whole run, read from the composed configuration; `plain` is that configuration, resolved."""

    output_dir: Path
    tokenizer: Path
    model: dict[str, Any]
    data: dict[str, Any]
    optim: dict[str, Any]
    trainer: TrainerSettings
    deepspeed: dict[str, Any] | None
    eval_data: dict[str, Any] | None
    plain: dict[str, Any]


def read_run(config: Mapping[str, Any]) -> RunSettings:
    """Check a resolved configuration.

    Raises:
        ConfigError: a key that is unknown, missing, of the wrong type or out of range.
    """
    check_keys(config, KEYS, "configuration")
    if not config.get("output_dir"):
        raise ConfigError("configuration: output_dir is needed: the folder for checkpoints and logs.")
    for key in ("model", "data", "optim"):
        if not isinstance(config.get(key), Mapping):
            raise ConfigError(f"configuration: {key} is needed: choose one of configs/{key} ({key}=NAME) or a file.")
    return RunSettings(
        output_dir=Path(str(config["output_dir"])), tokenizer=_tokenizer_folder(config.get("tokenizer")),
        model=dict(config["model"]), data=dict(config["data"]), optim=dict(config["optim"]),
        trainer=read_trainer(config.get("trainer") or {}), deepspeed=_mapping(config, "deepspeed"),
        eval_data=_mapping(config, "eval_data"), plain=dict(config))


def read_trainer(config: Mapping[str, Any]) -> TrainerSettings:
    """`TrainerSettings` of a mapping.

    Raises:
        ConfigError: as `read_run`.
    """
    settings = from_mapping(TrainerSettings, config, "trainer")
    if isinstance(settings.gradient_checkpointing, str) and settings.gradient_checkpointing != "selective":
        raise ConfigError("trainer: gradient_checkpointing is true, false or selective, not "
                          f"{settings.gradient_checkpointing!r}.")
    for key, options in (("precision", PRECISIONS), ("loss_average", AVERAGES)):
        if getattr(settings, key) not in options:
            raise ConfigError(f"trainer: {key} must be one of {', '.join(str(o) for o in options if o)}, not "
                              f"{getattr(settings, key)!r}.")
    for report in settings.report_to:
        if report not in REPORTS:
            raise ConfigError(f"trainer: report_to knows {', '.join(REPORTS)} (and none), not {report!r}.")
    least = {"max_steps": 1, "gradient_accumulation_steps": 1, "logging_steps": 1, "save_steps": 0, "eval_steps": 0,
             "eval_batches": 1, "dataloader_num_workers": 0, "max_grad_norm": 0, "timeout_minutes": 0,
             "text_weight": 0, "image_weight": 0, "seed": 0, "save_total_limit": 1}
    for key, smallest in least.items():
        value = getattr(settings, key)
        if value is not None and value < smallest:
            raise ConfigError(f"trainer: {key} must be at least {smallest}, not {value}.")
    return settings


def from_mapping(kind: type[Any], config: Mapping[str, Any], where: str) -> Any:
    """An instance of a dataclass out of a mapping, with its scalar types checked (an int will do for a float).

    Raises:
        ConfigError: an unknown key or a value of another type.
    """
    known = {entry.name: entry for entry in fields(kind)}
    check_keys(config, known, where)
    hints = get_type_hints(kind)
    values = {key: _typed(hints[key], value, f"{where}: {key}") for key, value in config.items()}
    missing = [name for name, entry in known.items()
               if entry.default is MISSING and entry.default_factory is MISSING and name not in values]
    if missing:
        raise ConfigError(f"{where}: {missing[0]} is needed.")
    return kind(**values)


def _typed(hint: Any, value: Any, where: str) -> Any:
    options = getattr(hint, "__args__", (hint,)) if getattr(hint, "__origin__", None) is not list else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if getattr(option, "__origin__", None) is list and isinstance(value, list):
            return [str(item) for item in value]
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option in (str, bool) and isinstance(value, option):
            return value
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options if option is not type(None))
    raise ConfigError(f"{where} must be {names}, not {value!r}.")


def _mapping(config: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"configuration: {key} must be a mapping, a file or nothing, not {value!r}.")
    return dict(value) if value else None


def _tokenizer_folder(node: Any) -> Path:
    """The folder of the tokenizer; training needs its words only, so pictures' networks are not loaded.

    Raises:
        ConfigError: no folder, or a `_target_` that is no tokenizer.
    """
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if target is not None:
            found = find_target(str(target), "tokenizer")
            if found.__module__ != TOKENIZER_TARGET or "tokenizer" not in found.__name__:
                raise ConfigError(f"tokenizer: _target_ {target!r} builds no tokenizer.")
        node = node.get("pretrained_model_name_or_path")
    if not isinstance(node, str) or not node:
        raise ConfigError("tokenizer: pretrained_model_name_or_path is needed: the tokenizer's folder.")
    return Path(node)
