"""Typed settings of a language model's training, behind `configs/trainer/*.yaml`.

Keys bear the names of the original's command line (transformers' `TrainingArguments`) where it has them. Unknown keys
are refused with the nearest known one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from seed_multimodal.config import find_target
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import check_keys, read_settings, setting
from seed_multimodal.training.config import TrainerConfig
from seed_multimodal.training.llm.loss import KINDS

TOKENIZER_TARGET = "seed_multimodal.configured"
PLAIN_TOKENIZER = "transformers.LlamaTokenizer.from_pretrained"  # SEED-X's
KEYS = ("output_dir", "model", "data", "optim", "trainer", "deepspeed", "tokenizer", "eval_data", "visual_encoder",
        "agent")


@dataclass
class TrainerSettings(TrainerConfig):
    """Settings of a language model's training.

    Attributes:
        loss_average: `tokens`: the mean over all learned tokens of a step, of all processes and micro-steps; `batch`:
            the mean of the micro-batches' means, as released. By default `tokens` for packed data, else `batch`.
        text_weight, image_weight: weights of text and image tokens in the loss.
        loss_kernel: `auto`, `plain`, `chunked` or `liger`.
        eval_steps: 0 never evaluates; eval_batches: micro-batches of the evaluation mixture per process.
        peak_tflops: of one device at this precision, for the MFU; known devices need none.
        tokens_per_step: positions of packed rows a step, in place of `gradient_accumulation_steps`.
        gradient_checkpointing, compile: override the model's settings if given.
        cpu_adam: DeepSpeed's own CPU optimiser for offloaded states (compiles for a minute at its first use).
    """

    loss_average: str | None = setting(None, choices=("tokens", "batch"))
    loss_kernel: str = setting("auto", choices=KINDS)
    text_weight: float = setting(1.0, least=0)
    image_weight: float = setting(1.0, least=0)
    eval_steps: int = setting(0, least=0)
    eval_batches: int = setting(16, least=1)
    peak_tflops: float | None = setting(None, above=0)
    tokens_per_step: int | None = setting(None, least=1)
    gradient_checkpointing: bool | Literal["selective"] | None = None
    compile: bool | None = None
    cpu_adam: bool = False


@dataclass
class RunSettings:
    """A whole run, read from the composed configuration; `plain` is that configuration, resolved. `visual_encoder` and
    `agent` are SEED-X's."""

    output_dir: Path
    tokenizer: Path
    model: dict[str, Any]
    data: dict[str, Any]
    optim: dict[str, Any]
    trainer: TrainerSettings
    deepspeed: dict[str, Any] | None
    eval_data: dict[str, Any] | None
    plain: dict[str, Any]
    visual_encoder: dict[str, Any] | None = None
    agent: dict[str, Any] | None = None


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
        trainer=read_settings(TrainerSettings, config.get("trainer") or {}, "trainer"),
        deepspeed=_mapping(config, "deepspeed"), eval_data=_mapping(config, "eval_data"), plain=dict(config),
        visual_encoder=_mapping(config, "visual_encoder"), agent=_mapping(config, "agent"))


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
        if target not in (None, PLAIN_TOKENIZER):
            found = find_target(str(target), "tokenizer")
            if found.__module__ != TOKENIZER_TARGET or "tokenizer" not in found.__name__:
                raise ConfigError(f"tokenizer: _target_ {target!r} builds no tokenizer.")
        node = node.get("pretrained_model_name_or_path")
    if not isinstance(node, str) or not node:
        raise ConfigError("tokenizer: pretrained_model_name_or_path is needed: the tokenizer's folder.")
    return Path(node)
