"""Command lines of the Hydra trainings: `python src/train/PROGRAM.py` with overrides or the original's flags.

    python src/train/train.py model=nano_lora tokenizer=nano data=my_data.yaml trainer.max_steps=100 output_dir=log/run
    python src/train/train.py --model configs/model/vicuna_7b_lora.yaml --train_data … --deepspeed … --bf16 True

A group (model, data, …) is set to the name of one of its configurations or the path of a file. Flags are translated
into overrides in command-line order; the last one wins, and a group's file replaces earlier settings of the group.

Further options: `--config-path DIR` (`-cp`), `--config-name NAME` (`-cn`), `--cfg` (print the resolved configuration
and exit), `--help`, `--debug` (tracebacks). Under torchrun every process runs it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seed_multimodal.config import read_yaml, resolve
from seed_multimodal.disk import read_json_object
from seed_multimodal.entry import run_and_exit, run_guarded
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.settings import describe_settings, nearest
from seed_multimodal.training.llm.config import project_path

# Program -> configuration below `configs`, and task below `training`.
PROGRAMS = {
    "train": ("train", "llm.task:LlmTask"),
    "train_seed_x_sft": ("train_seed_x_sft", "seed_x.tuning:TuningTask"),
    "train_lavit": ("train_lavit", "lavit.pretrain:PretrainTask"),
    "train_seed_x_detokenizer": ("seed_x_detokenizer/train", "seed_x.detokenizer:DetokenizerTask"),
    "train_lavit_detokenizer": ("lavit_detokenizer/train", "lavit.detokenizer:LavitPixelTask"),
}
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
    """Spellings of true and false -> value."""
    return {
        **dict.fromkeys(("true", "t", "yes", "y", "1"), value),
        **dict.fromkeys(("false", "f", "no", "n", "0")),
    }


# Flag -> override, or several; `{value}`: as typed, `{text}`: quoted.
FLAGS = {
    **{
        flag: f"{group}={{value}}"
        for flag, group in {  # a group's file
            "model": "model",
            "tokenizer": "tokenizer",
            "train_data": "data",
            "eval_data": "eval_data",
            "deepspeed": "deepspeed",
            "llm_model": "model",
            "train_dataset": "data",
            "deepspeed_plugin": "deepspeed",
            "agent_model": "agent",
            "visual_encoder": "visual_encoder",
        }.items()
    },
    "output_dir": "++output_dir={text}",
    "run_name": "++trainer.run_name={text}",
    "expr_name": "++trainer.run_name={text}",
    "resume": "++trainer.resume={text}",
    "resume_from_checkpoint": "++trainer.resume={text}",
    "device": "++trainer.device={text}",
    "lr_scheduler_type": "++optim.lr_scheduler_type={text}",
    **{
        flag: f"++trainer.{flag}={{value}}"
        for flag in (
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
        )
    },
    **{
        flag: f"++optim.{flag}={{value}}"
        for flag in (
            "learning_rate",
            "min_lr_ratio",
            "warmup_ratio",
            "warmup_steps",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
        )
    },
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
# Flag -> translation of values (None: no override); other values are errors, or unchanged.
_EVALUATE = {"no": "0", "steps": "${trainer.logging_steps}"}
ONLY: dict[str, Mapping[str, str | None]] = {
    "bf16": _boolean("bf16"),
    "fp16": _boolean("fp16"),
    "use_cpu": _boolean("cpu"),
    "no_cuda": _boolean("cpu"),
    "evaluation_strategy": _EVALUATE,
    "eval_strategy": _EVALUATE,
    "save_strategy": {"no": "0", "steps": None},
}
ALSO = {
    "resume_from_checkpoint": {"True": "auto"},
    "mixed_precision": {"no": "fp32"},
    "optim": {"adamw_torch": "adamw", "adamw_torch_fused": "adamw"},
    "report_to": {"none": "", "all": "tensorboard"},
}
# FSDP's flags -> the flag and file of ZeRO-3, which shards weights, gradients and optimizer states, too.
FSDP = {
    "fsdp": "--deepspeed configs/deepspeed/stage3_offload_bf16.json (or stage3_fp16.json)",
    "fsdp_plugin": "--deepspeed_plugin configs/accelerate/deepspeed_stage_3.yaml",
}
REFUSED = (*FSDP, "load_best_model_at_end", "push_to_hub", "label_smoothing_factor")
# Accepted but ignored: micro-batches and views are set by the data configuration, most of the rest by the engine.
IGNORED = (
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
_BARE = (
    "bf16",
    "fp16",
    "use_cpu",
    "no_cuda",
    "gradient_checkpointing",
    "torch_compile",
    *REFUSED,
    *IGNORED,
    "c",
    "cfg",
    "h",
    "help",
    "debug",
)  # value optional
_KNOWN = (*FLAGS, *REFUSED, *IGNORED, *OPTIONS)
_OWN = ("resume", "device")  # new flags, which do not activate the original's defaults


def main_process(program: str | Path) -> NoReturn:
    """Run the training `MultiModalLLM/src/train/PROGRAM.py` as a program."""
    file = Path(program).resolve()
    run_and_exit(lambda: main(file.stem, file.parents[2] / "configs"))


def main(program: str, configs: str | Path, argv: Sequence[str] | None = None) -> int:
    """Compose the configuration and train; returns the exit code (2: error, printed to stderr; 143: SIGTERM)."""
    arguments, rank = list(sys.argv[1:] if argv is None else argv), os.environ.get("RANK", "0")
    name = f"{program}.py" if rank == "0" else f"{program}.py (rank {rank})"
    return run_guarded(name, "--debug" in arguments, lambda: run(program, Path(configs), arguments))


def run(program: str, configs: Path, arguments: Sequence[str]) -> int:
    """As `main`, but raises errors."""
    given, file = translate(arguments), configs / f"{PROGRAMS[program][0]}.yaml"
    folder = Path(given.options.get("config_path", file.parent))
    name = given.options.get("config_name", file.stem).removesuffix(".yaml")
    module, _, attribute = PROGRAMS[program][1].partition(":")
    task = getattr(import_module(f"seed_multimodal.training.{module}"), attribute)
    if "help" in given.options:
        print(help_text(folder / f"{name}.yaml", task.group_types))
        return 0
    config = compose(arguments, folder, name, whole="cfg" not in given.options)
    if "cfg" in given.options:
        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return 0
    if given.ignored and os.environ.get("RANK", "0") == "0":
        print(f"[train] ignored: {', '.join(given.ignored)}.", flush=True)
    task.train(config)
    return 0


def help_text(file: Path, group_types: Mapping[str, type]) -> str:
    """The configuration's header comment, its groups' files, and the keys with their defaults."""
    text = file.read_text(encoding="utf-8").splitlines()
    lines = [
        line[1:].removeprefix(" ") for line in itertools.takewhile(lambda one: one[:1] == "#", text)
    ]
    lines += ["", *str(__doc__).strip().splitlines()[-2:], "", f"Configurations in {file.parent}:"]
    for group in GROUPS:
        names = _configurations(group_folder(file.parent, group))
        lines += [f"  {group}: {', '.join(names)}"] if names else []
    lines += [
        "",
        "Keys and defaults (overridden by a group's file; ???: required):",
        "  output_dir=???",
    ]
    for group, kind in group_types.items():
        lines += [f"  {line}" for line in describe_settings(kind, group)]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ flags -> overrides


class Translated(NamedTuple):
    """A parsed command line: overrides in order, our own options, ignored flags, and whether any flag of the original
    was used."""

    overrides: list[str]
    options: dict[str, str]
    ignored: list[str]
    original: bool


def translate(arguments: Sequence[str]) -> Translated:
    """Parse `--flag value`, `--flag=value`, boolean `--flag` and `--no_flag`, and overrides. Raises ConfigError: an
    unknown flag, a wrong value, or an unsupported option."""
    flags, made = dict[str, str](), set[str]()
    overrides, options, ignored, words = list[str](), dict[str, str](), list[str](), list(arguments)
    while words:
        word = words.pop(0)
        if not _is_flag(word):
            group = word.partition("=")[0]
            overrides = [
                one for one in overrides if one not in made or not one.startswith(f"++{group}.")
            ]
            overrides.append(word)
            continue
        flag, value = _read_flag(word, words)
        flags[flag] = value
        if flag in OPTIONS:
            options[OPTIONS[flag]] = value
        elif flag in IGNORED:
            ignored.append(f"--{flag}")
        elif flag in REFUSED and value.lower() not in ("false", "no", "0", "0.0", ""):
            instead = f"; use ZeRO-3 instead: {FSDP[flag]}" if flag in FSDP else ""
            raise ConfigError(f"--{flag}: not supported{instead}.")
        else:
            translated = _overrides(flag, value)
            made.update(translated)
            overrides += translated
    if "num_train_epochs" in flags and "max_steps" not in flags:
        raise ConfigError("--num_train_epochs: not supported; use --max_steps.")
    if "eval_steps" in flags:
        overrides = [one for one in overrides if not one.endswith(_EVALUATE["steps"])]
    return Translated(
        overrides, options, ignored, any(flag not in (*OPTIONS, *_OWN) for flag in flags)
    )


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit()


def _read_flag(word: str, words: list[str]) -> tuple[str, str]:
    """A flag's name and value, consumed from the following words. An override after a flag with optional value is not
    its value."""
    flag, equals, value = word.lstrip("-").partition("=")
    flag = flag.replace("-", "_")
    if flag not in _KNOWN and flag.removeprefix("no_") in _BARE:
        return flag.removeprefix("no_"), "False"
    if flag not in _KNOWN:
        raise ConfigError(
            f"--{flag}: unknown option{nearest(f'--{flag}', [f'--{known}' for known in _KNOWN])}."
        )
    if equals:
        return flag, value
    values: list[str] = []
    while words and not _is_flag(words[0]) and (not values or flag == "report_to"):
        if ("=" in words[0] or words[0].startswith("~")) and (values or flag in _BARE):
            break
        values.append(words.pop(0))
    if not values and flag not in _BARE:
        raise ConfigError(f"--{flag}: needs a value.")
    return flag, ",".join(values) if values else "True"


def _overrides(flag: str, typed: str) -> list[str]:
    """The overrides for a flag."""
    value: str | None = ALSO.get(flag, {}).get(typed, typed)
    if known := ONLY.get(flag):
        if typed.lower() not in known:
            raise ConfigError(f"--{flag}: must be one of {', '.join(known)}, not {typed!r}.")
        value = known[typed.lower()]
    if flag not in FLAGS or value is None:
        return []
    text = json.dumps(value, ensure_ascii=False)
    return [template.format(value=value, text=text) for template in FLAGS[flag].split()]


# ----------------------------------------------------------------------------------------- overrides -> configuration


def compose(
    arguments: Sequence[str], folder: str | Path, name: str = "train", *, whole: bool = True
) -> dict[str, Any]:
    """Flags and overrides → the resolved configuration of `NAME.yaml`, whose `defaults` or `files` select groups. Hydra
    only applies the overrides. If not `whole`, required values may be missing (`???`). Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    home = Path(folder).resolve()
    if not (home / f"{name}.yaml").is_file():
        raise ConfigError(
            f"{home / name}.yaml: no such configuration file (--config-path, --config-name)."
        )
    given, primary = translate(arguments), read_yaml(home / f"{name}.yaml")
    choices = {
        str(group): str(file)
        for one in [*primary.pop("defaults", []), primary.pop("files", {})]
        if one != "_self_"
        for group, file in one.items()
    }
    special = "original" if name == "train" else f"{name}_original"
    if given.original:  # use the original's defaults
        choices |= {
            group: special
            for group in ("optim", "trainer")
            if (home / group / f"{special}.yaml").is_file()
        }
    overrides = []
    for word in given.overrides:
        group, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            raise ConfigError(
                f"{word!r} is neither an option (--name) nor an override (key=value)."
            )
        if group in GROUPS:
            choices[group] = value
        else:
            overrides.append(word if word[0] in "+~" else f"++{word}")
    nodes = {
        group: _load(home, group, choice)
        for group, choice in choices.items()
        if choice.lower() not in ("", "none", "null")
    }
    ConfigStore.instance().store(name="run", node=OmegaConf.merge(nodes, primary))
    try:
        with initialize(version_base="1.3", config_path=None):
            config = resolve(hydra_compose("run", overrides=overrides), home / "configuration")
        plain: Any = OmegaConf.to_container(config, throw_on_missing=whole)
    except (HydraException, OmegaConfBaseException) as error:
        if key := getattr(error, "full_key", None):
            raise ConfigError(f"configuration: {key} is required.") from error
        raise ConfigError(
            f"{first_line(error).rstrip('.')}; values with characters like = ( ) ' need inner "
            f"quotes: 'key=\"value\"'."
        ) from error
    return {str(key): value for key, value in plain.items()}


def group_folder(home: Path, group: str) -> Path:
    """The folder of a group's files: below the configurations, or next to them (DeepSpeed)."""
    folder = FOLDERS.get(group, group)
    return next(
        (place / folder for place in (home, home.parent) if (place / folder).is_dir()),
        home / folder,
    )


def _configurations(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*") if file.suffix in _SUFFIXES)


def _load(home: Path, group: str, choice: str) -> dict[str, Any]:
    """The content of a group's configuration, by name or file path."""
    folder = group_folder(home, group)
    ours = choice.removeprefix("SEED-X/")  # prefix of the original's file names
    places = [
        Path(choice),
        *(folder / f"{choice}{suffix}" for suffix in ("", *_SUFFIXES)),
        Path(ours),
        home.parent / ours,
        home.parent.parent / ours,
    ]
    file = next((place for place in places if place.is_file()), None)
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
    # SEED-X's name of DeepSpeed's JSON.
    return _load(home, group, str(node["hf_ds_config"])) if "hf_ds_config" in node else node
