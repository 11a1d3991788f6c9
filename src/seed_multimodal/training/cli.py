"""Command lines of the Hydra trainings, with overrides or the original's flags.

    python src/train/train.py model=nano_lora tokenizer=nano data=my_data.yaml output_dir=log/run
    python src/train/train.py --model configs/model/vicuna_7b_lora.yaml --train_data … --bf16 True

A group (model, data, …) is set to the name of one of its configurations or the path of a file.
Flags are translated into overrides in command-line order; the last one wins, and a group's file
replaces earlier settings of the group.

Further options: `--config-path DIR` (`-cp`), `--config-name NAME` (`-cn`), `--cfg` (print the
resolved configuration and exit), `--help`, `--debug` (tracebacks). Under torchrun every process
runs it.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seed_multimodal.config import read_yaml, resolve
from seed_multimodal.disk import read_json_object
from seed_multimodal.entry import run_and_exit, run_guarded
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.models.registry import find_training
from seed_multimodal.settings import describe_settings, nearest
from seed_multimodal.training.llm.config import project_path

if TYPE_CHECKING:
    from seed_multimodal.training.run import RunTask

GROUPS = (
    "model",
    "data",
    "optim",
    "trainer",
    "tokenizer",
    "deepspeed",
    "eval_data",
    "visual_encoder",
    "agent",
)
FOLDERS = {"eval_data": "data", "agent": "clm_models"}  # groups that share another group's folder
_SUFFIXES = (".yaml", ".yml", ".json")


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
OPTIONS = {
    "cp": "config_path",
    "cd": "config_path",
    "config_path": "config_path",
    "config_dir": "config_path",
    "cn": "config_name",
    "config_name": "config_name",
    "c": "cfg",
    "cfg": "cfg",
    "h": "help",
    "help": "help",
    "debug": "debug",
}
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
    "c",
    "cfg",
    "h",
    "help",
    "debug",
)
_ALL_FLAGS = (*FLAGS, *UNSUPPORTED_FLAGS, *IGNORED_FLAGS, *OPTIONS)
_NEW_FLAGS = ("resume", "device")  # they do not activate the original's defaults


def main_process(program: str | Path) -> NoReturn:
    """Run the training `MultiModalLLM/src/train/PROGRAM.py` as a program."""
    file = Path(program).resolve()
    run_and_exit(lambda: main(file.stem, file.parents[2] / "configs"))


def main(program: str, configs: str | Path, argv: Sequence[str] | None = None) -> int:
    """Compose the configuration and train; returns the exit code (2: error, printed to stderr; 143:
    SIGTERM)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Errors of other processes name their rank.
    rank = os.environ.get("RANK", "0")
    name = f"{program}.py" if rank == "0" else f"{program}.py (rank {rank})"
    return run_guarded(name, "--debug" in arguments, lambda: run(program, Path(configs), arguments))


def run(program: str, configs: Path, arguments: Sequence[str]) -> int:
    """As `main`, but raises errors."""
    training = find_training(program)
    command = translate(arguments)
    file = configs / f"{training.config}.yaml"
    folder = Path(command.options.get("config_path", file.parent))
    name = command.options.get("config_name", file.stem).removesuffix(".yaml")
    # Imported late, since a wrong flag should not wait for torch.
    task_type: type[RunTask] = pkgutil.resolve_name(training.task)

    # Only print, if asked for.
    if "help" in command.options:
        print(help_text(folder / f"{name}.yaml", task_type.run_type.group_types()))
        return 0
    only_print = "cfg" in command.options
    config = compose(arguments, folder, name, require_all=not only_print)
    if only_print:
        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return 0

    # Train.
    if command.ignored and os.environ.get("RANK", "0") == "0":
        print(f"[train] ignored: {', '.join(command.ignored)}.", flush=True)
    task_type.train(config)
    return 0


def help_text(file: Path, group_types: Mapping[str, type]) -> str:
    """The configuration's header comment, its groups' files, and the keys with their defaults."""
    # 1. The header.
    lines: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))

    # 2. Further options, and the files of each group.
    further_options = str(__doc__).strip().split("\n\n")[-1].splitlines()
    lines += ["", *further_options, "", f"Configurations in {file.parent}:"]
    for group in GROUPS:
        names = _configurations(group_folder(file.parent, group))
        if names:
            lines.append(f"  {group}: {', '.join(names)}")

    # 3. The keys.
    lines += [
        "",
        "Keys and defaults (overridden by a group's file; ???: required):",
        "  output_dir=???",
    ]
    for group, group_type in group_types.items():
        lines += [f"  {line}" for line in describe_settings(group_type, group)]
    return "\n".join(lines)


# ------------------------------------------------------------------------------- flags -> overrides


class CommandLine(NamedTuple):
    """A parsed command line."""

    overrides: list[str]  # in order
    options: dict[str, str]  # values of `OPTIONS`
    ignored: list[str]  # flags
    original: bool  # whether any flag of the original was used


def translate(arguments: Sequence[str]) -> CommandLine:
    """Parse `--flag value`, `--flag=value`, boolean `--flag` and `--no_flag`, and overrides.

    Raises ConfigError: an unknown flag, a wrong value, or an unsupported option.
    """
    remaining = list(arguments)
    flags: dict[str, str] = {}
    overrides: list[str] = []
    from_flags: set[str] = set()  # overrides that were translated from flags
    options: dict[str, str] = {}
    ignored: list[str] = []
    while remaining:
        argument = remaining.pop(0)
        if not _is_flag(argument):
            # A group's file replaces what earlier flags set in the group.
            prefix = f"++{argument.partition('=')[0]}."
            overrides = [
                override
                for override in overrides
                if override not in from_flags or not override.startswith(prefix)
            ]
            overrides.append(argument)
            continue
        flag, value = _read_flag(argument, remaining)
        flags[flag] = value
        if flag in OPTIONS:
            options[OPTIONS[flag]] = value
        elif flag in IGNORED_FLAGS:
            ignored.append(f"--{flag}")
        elif flag in UNSUPPORTED_FLAGS and value.lower() not in ("false", "no", "0", "0.0", ""):
            alternative = f"; use ZeRO-3 instead: {FSDP[flag]}" if flag in FSDP else ""
            raise ConfigError(f"--{flag}: not supported{alternative}.")
        else:
            translated = _overrides(flag, value)
            from_flags.update(translated)
            overrides += translated

    # Combinations of flags.
    if "num_train_epochs" in flags and "max_steps" not in flags:
        raise ConfigError("--num_train_epochs: not supported; use --max_steps.")
    if "eval_steps" in flags:
        default_interval = EVAL_STRATEGIES["steps"]
        overrides = [text for text in overrides if not text.endswith(default_interval)]
    original = any(flag not in OPTIONS and flag not in _NEW_FLAGS for flag in flags)
    return CommandLine(overrides, options, ignored, original)


def _is_flag(argument: str) -> bool:
    return argument.startswith("-") and not argument[1:2].isdigit()


def _read_flag(argument: str, remaining: list[str]) -> tuple[str, str]:
    """A flag's name and value, consumed from the remaining arguments.

    An override after a flag with optional value is not its value.
    """
    # 1. The flag, or the negation of a switch.
    flag, equals, value = argument.lstrip("-").partition("=")
    flag = flag.replace("-", "_")
    if flag not in _ALL_FLAGS:
        positive = flag.removeprefix("no_")
        if positive in _SWITCHES:
            return positive, "False"
        hint = nearest(f"--{flag}", [f"--{name}" for name in _ALL_FLAGS])
        raise ConfigError(f"--{flag}: unknown option{hint}.")
    if equals:
        return flag, value

    # 2. Its values; only `--report_to` has several.
    values: list[str] = []
    while remaining and not _is_flag(remaining[0]) and (not values or flag == "report_to"):
        is_override = "=" in remaining[0] or remaining[0].startswith("~")
        if is_override and (values or flag in _SWITCHES):
            break
        values.append(remaining.pop(0))
    if values:
        return flag, ",".join(values)
    if flag not in _SWITCHES:
        raise ConfigError(f"--{flag}: needs a value.")
    return flag, "True"


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


# ----------------------------------------------------------------------- overrides -> configuration


def compose(
    arguments: Sequence[str], folder: str | Path, name: str = "train", *, require_all: bool = True
) -> dict[str, Any]:
    """Flags and overrides → the resolved configuration of `NAME.yaml`, whose `defaults` or `files`
    select groups.

    Hydra only applies the overrides.
    require_all: False: required values may be missing (`???`).

    Raises ConfigError.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    configs = Path(folder).resolve()
    file = configs / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"{file}: no such configuration file (--config-path, --config-name).")
    command = translate(arguments)
    primary = read_yaml(file)

    # 1. The file of each group: by the configuration, for the original's flags its defaults, by
    # overrides.
    choices = _default_choices(primary)
    if command.original:
        original = "original" if name == "train" else f"{name}_original"
        for group in ("optim", "trainer"):
            if (configs / group / f"{original}.yaml").is_file():
                choices[group] = original
    group_overrides, overrides = _split_overrides(command.overrides)
    choices |= group_overrides
    groups = {}
    for group, choice in choices.items():
        if choice.lower() not in ("", "none", "null"):
            groups[group] = _load(configs, group, choice)

    # 2. Hydra applies the overrides of single keys, OmegaConf resolves references.
    ConfigStore.instance().store(name="run", node=OmegaConf.merge(groups, primary))
    try:
        with initialize(version_base="1.3", config_path=None):
            composed = hydra_compose("run", overrides=overrides)
            config = resolve(composed, configs / "configuration")
        plain: Any = OmegaConf.to_container(config, throw_on_missing=require_all)
    except (HydraException, OmegaConfBaseException) as error:
        key = getattr(error, "full_key", None)
        if key:
            raise ConfigError(f"configuration: {key} is required.") from error
        raise ConfigError(
            f"{first_line(error).rstrip('.')}; values with characters like = ( ) ' need inner "
            f"quotes: 'key=\"value\"'."
        ) from error
    return {str(key): value for key, value in plain.items()}


def _default_choices(primary: DictConfig) -> dict[str, str]:
    """Group → configuration, removed from the primary configuration's `defaults` (Hydra's) and
    `files`."""
    choices: dict[str, str] = {}
    for entry in [*primary.pop("defaults", []), primary.pop("files", {})]:
        if entry != "_self_":
            for group, choice in entry.items():
                choices[str(group)] = str(choice)
    return choices


def _split_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Overrides → choices of groups, and Hydra's overrides of keys. Raises ConfigError: neither."""
    choices: dict[str, str] = {}
    key_overrides: list[str] = []
    for override in overrides:
        group, equals, value = override.partition("=")
        if not equals and not override.startswith("~"):
            raise ConfigError(
                f"{override!r} is neither an option (--name) nor an override (key=value)."
            )
        if group in GROUPS:
            choices[group] = value
        else:
            # `++`: set the key, whether the configuration has it or not.
            has_prefix = override[0] in "+~"
            key_overrides.append(override if has_prefix else f"++{override}")
    return choices, key_overrides


def group_folder(configs: Path, group: str) -> Path:
    """The folder of a group's files: below the configurations, or next to them (DeepSpeed)."""
    name = FOLDERS.get(group, group)
    for parent in (configs, configs.parent):
        if (parent / name).is_dir():
            return parent / name
    return configs / name


def _configurations(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*") if file.suffix in _SUFFIXES)


def _load(configs: Path, group: str, choice: str) -> dict[str, Any]:
    """The content of a group's configuration, by name or file path."""
    folder = group_folder(configs, group)
    relative = choice.removeprefix("SEED-X/")  # prefix of the original's file names
    candidates = [
        Path(choice),
        *(folder / f"{choice}{suffix}" for suffix in ("", *_SUFFIXES)),
        Path(relative),
        configs.parent / relative,
        configs.parent.parent / relative,
    ]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        if group == "tokenizer" and (project_path(choice) / "tokenizer.model").is_file():
            return {"pretrained_model_name_or_path": choice}
        names = _configurations(folder)
        raise ConfigError(
            f"{group}={choice}: no such file, and no such configuration in {folder}"
            f"{nearest(Path(choice).stem, names)}; it has {', '.join(names) or 'none'}."
        )
    if file.suffix == ".json":
        return read_json_object(file, ConfigError)
    node: Any = OmegaConf.to_container(read_yaml(file), resolve=False)
    # SEED-X's files of accelerate name DeepSpeed's JSON.
    if "hf_ds_config" in node:
        return _load(configs, group, str(node["hf_ds_config"]))
    return node
