"""The originals' flags for the Hydra trainings, translated into overrides.

    python src/train/train.py --model configs/model/vicuna_7b_lora.yaml --train_data … --bf16 True

Flags and overrides apply in command-line order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from seed_multimodal.entry import run_and_exit
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest
from seed_multimodal.training.cli import CommandLine, main


def _boolean(value: str) -> dict[str, str | None]:
    """Spellings of true -> value, of false -> None."""
    return {
        **dict.fromkeys(("true", "t", "yes", "y", "1"), value),
        **dict.fromkeys(("false", "f", "no", "n", "0")),
    }


def _overrides_of(section: str, keys: Sequence[str]) -> dict[str, str]:
    """Flags with the name of their key in a section."""
    return {key: f"++{section}.{key}={{value}}" for key in keys}


# Flag -> override, or several; `{value}`: as typed, `{text}`: quoted.
FLAGS = {
    # A group's file.
    "model": "model={value}",
    "tokenizer": "tokenizer={value}",
    "train_data": "data={value}",
    "eval_data": "eval_data={value}",
    "deepspeed": "deepspeed={value}",
    "llm_model": "model={value}",
    "train_dataset": "data={value}",
    "deepspeed_plugin": "deepspeed={value}",
    "agent_model": "agent={value}",
    "visual_encoder": "visual_encoder={value}",
    "output_dir": "++output_dir={text}",
    "run_name": "++trainer.run_name={text}",
    "expr_name": "++trainer.run_name={text}",
    "resume": "++trainer.resume={text}",
    "resume_from_checkpoint": "++trainer.resume={text}",
    "device": "++trainer.device={text}",
    "lr_scheduler_type": "++optim.lr_scheduler_type={text}",
    **_overrides_of(
        "trainer",
        (
            "max_steps",
            "gradient_accumulation_steps",
            "max_grad_norm",
            "seed",
            "dataloader_num_workers",
            "logging_steps",
            "save_steps",
            "save_total_limit",
            "eval_steps",
            "gradient_checkpointing",
        ),
    ),
    **_overrides_of(
        "optim",
        (
            "learning_rate",
            "min_lr_ratio",
            "warmup_ratio",
            "warmup_steps",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
        ),
    ),
    "torch_compile": "++trainer.compile={value}",
    "optim": "++optim.name={value}",
    "report_to": "++trainer.report_to=[{value}]",
    "mixed_precision": "++trainer.precision={value}",
    "bf16": "++trainer.precision={value}",
    "fp16": "++trainer.precision={value}",
    "use_cpu": "++trainer.device={value}",
    "no_cuda": "++trainer.device={value}",
    "evaluation_strategy": "++trainer.eval_steps={value}",
    "eval_strategy": "++trainer.eval_steps={value}",
    "save_strategy": "++trainer.save_steps={value} ++trainer.save_seconds={value}",
}
EVAL_STRATEGIES = {"no": "0", "steps": "${trainer.logging_steps}"}
# Flag -> allowed values and their translation (None: no override).
CHOICES: dict[str, Mapping[str, str | None]] = {
    "bf16": _boolean("bf16"),
    "fp16": _boolean("fp16"),
    "use_cpu": _boolean("cpu"),
    "no_cuda": _boolean("cpu"),
    "evaluation_strategy": EVAL_STRATEGIES,
    "eval_strategy": EVAL_STRATEGIES,
    "save_strategy": {"no": "0", "steps": None},
}
# Flag -> translation of some values; others are unchanged.
SYNONYMS = {
    "resume_from_checkpoint": {"True": "auto"},
    "mixed_precision": {"no": "fp32"},
    "optim": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw"},
    "report_to": {"none": "", "all": "tensorboard"},
}
# FSDP's flags -> the flag and file of ZeRO-3, which shards weights, gradients and optimizer states,
# too.
FSDP = {
    "fsdp": "--deepspeed configs/deepspeed/stage3_offload_bf16.json (or stage3_fp16.json)",
    "fsdp_plugin": "--deepspeed_plugin configs/accelerate/deepspeed_stage_3.yaml",
}
UNSUPPORTED_FLAGS = (*FSDP, "load_best_model_at_end", "push_to_hub", "label_smoothing_factor")
# Accepted but ignored: micro-batches and views are set by the data configuration, most of the rest
# by the engine.
IGNORED_FLAGS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "batch_size",
    "coco_caption_root",
    "ignore_data_skip",
    "resume_steps",
    "data_seed",
    "project_name",
    "image_transform",
    "logging_nan_inf_filter",
    "log_level",
    "log_level_replica",
    "logging_dir",
    "logging_strategy",
    "logging_first_step",
    "disable_tqdm",
    "log_on_each_node",
    "dataloader_drop_last",
    "dataloader_pin_memory",
    "group_by_length",
    "remove_unused_columns",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "ddp_find_unused_parameters",
    "ddp_backend",
    "ddp_timeout",
    "ddp_bucket_cap_mb",
    "local_rank",
    "full_determinism",
    "tf32",
    "bf16_full_eval",
    "fp16_full_eval",
    "fp16_opt_level",
    "half_precision_backend",
    "overwrite_output_dir",
    "do_train",
    "do_eval",
    "save_safetensors",
    "prediction_loss_only",
    "past_index",
    "save_on_each_node",
    "include_inputs_for_metrics",
    "eval_accumulation_steps",
    "eval_delay",
    "num_train_epochs",
)
# Flags whose value is optional.
_SWITCHES = (
    "bf16",
    "fp16",
    "use_cpu",
    "no_cuda",
    "gradient_checkpointing",
    "torch_compile",
    *UNSUPPORTED_FLAGS,
    *IGNORED_FLAGS,
)
_ALL_FLAGS = (*FLAGS, *UNSUPPORTED_FLAGS, *IGNORED_FLAGS)
# Hydra's, which are left to it.
HYDRA_OPTIONS = (
    "help",
    "hydra_help",
    "version",
    "cfg",
    "resolve",
    "package",
    "run",
    "multirun",
    "shell_completion",
    "config_path",
    "config_name",
    "config_dir",
    "experimental_rerun",
    "info",
)
_NEW_FLAGS = ("resume", "device")  # they do not activate the original's defaults


def main_process(program: str | Path) -> NoReturn:
    """Run the training `MultiModalLLM/src/train/PROGRAM.py` as a program."""
    file = Path(program).resolve()
    run_and_exit(lambda: main(file.stem, file.parents[2] / "configs"))


def translate(arguments: Sequence[str]) -> CommandLine:
    """`--flag value`, `--flag=value`, boolean `--flag` and `--no_flag` as overrides.

    Hydra's options and overrides stay.

    Raises ConfigError: an unknown flag, a wrong value, or an unsupported option.
    """
    remaining = list(arguments)
    flags: dict[str, str] = {}
    translated: list[str] = []
    from_flags: set[str] = set()  # overrides that were translated from flags
    ignored: list[str] = []
    while remaining:
        argument = remaining.pop(0)
        flag = argument[2:].partition("=")[0].replace("-", "_")
        if not argument.startswith("--") or flag in HYDRA_OPTIONS:
            # A group's file replaces what earlier flags set in the group.
            prefix = f"++{argument.partition('=')[0]}."
            translated = [
                text for text in translated if text not in from_flags or not text.startswith(prefix)
            ]
            translated.append(argument)
            continue
        flag, value = _read_flag(argument, remaining)
        flags[flag] = value
        if flag in IGNORED_FLAGS:
            ignored.append(f"--{flag}")
        elif flag in UNSUPPORTED_FLAGS and value.lower() not in ("false", "no", "0", "0.0", ""):
            alternative = f"; use ZeRO-3 instead: {FSDP[flag]}" if flag in FSDP else ""
            raise ConfigError(f"--{flag}: not supported{alternative}.")
        else:
            overrides = _overrides(flag, value)
            from_flags.update(overrides)
            translated += overrides

    # Combinations of flags.
    if "num_train_epochs" in flags and "max_steps" not in flags:
        raise ConfigError("--num_train_epochs: not supported; use --max_steps.")
    if "eval_steps" in flags:
        default_interval = EVAL_STRATEGIES["steps"]
        translated = [text for text in translated if not text.endswith(default_interval)]
    return CommandLine(translated, ignored, any(flag not in _NEW_FLAGS for flag in flags))


def _read_flag(argument: str, remaining: list[str]) -> tuple[str, str]:
    """A flag's name and value, consumed from the remaining arguments.

    Raises ConfigError: an unknown flag, or one without value.
    """
    # 1. The flag, or the negation of a switch.
    flag, equals, value = argument[2:].partition("=")
    flag = flag.replace("-", "_")
    if flag not in _ALL_FLAGS:
        positive = flag.removeprefix("no_")
        if positive in _SWITCHES:
            return positive, "False"
        hint = nearest(f"--{flag}", [f"--{name}" for name in _ALL_FLAGS])
        raise ConfigError(f"--{flag}: unknown option{hint}.")
    if equals:
        return flag, value

    # 2. Its values. An override after a switch is not its value.
    values: list[str] = []
    while remaining and not re.match("-[^0-9]", remaining[0]):
        is_override = "=" in remaining[0] or remaining[0].startswith("~")
        if (values and flag != "report_to") or (is_override and (values or flag in _SWITCHES)):
            break
        values.append(remaining.pop(0))
    if not values and flag not in _SWITCHES:
        raise ConfigError(f"--{flag}: needs a value.")
    return flag, ",".join(values) or "True"


def _overrides(flag: str, typed: str) -> list[str]:
    """The overrides for a flag."""
    # The value in our words; None: no override.
    value: str | None = SYNONYMS.get(flag, {}).get(typed, typed)
    if flag in CHOICES:
        choices = CHOICES[flag]
        if typed.lower() not in choices:
            raise ConfigError(f"--{flag}: must be one of {', '.join(choices)}, not {typed!r}.")
        value = choices[typed.lower()]
    if flag not in FLAGS or value is None:
        return []
    text = json.dumps(value, ensure_ascii=False)
    return [template.format(value=value, text=text) for template in FLAGS[flag].split()]
