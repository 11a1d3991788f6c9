"""The original command line (`--model X.yaml --max_steps 30000 --bf16 True …`) as settings of ours.

What: `translate` takes the flags of the original's `train.py`, its own and those of transformers' `TrainingArguments`,
out of an argument list. Anything that is no flag stays, as an override (`trainer.max_steps=10`).
Peculiar: booleans as `HfArgumentParser` reads them: `--bf16`, `--bf16 True`, `--no_bf16`. Flags that mean nothing here
(the data order is always restored, for example) are accepted with a remark; what cannot be done is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest

# Flags that name a file (or one of the group's configurations) -> the group.
GROUPS = {"model": "model", "tokenizer": "tokenizer", "train_data": "data", "eval_data": "eval_data",
          "deepspeed": "deepspeed"}

_YES, _NO = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")


def _boolean(text: str) -> bool:
    if text.lower() not in (*_YES, *_NO):
        raise ValueError
    return text.lower() in _YES


def _whole(text: str) -> int:
    number = float(text)
    if number != int(number):
        raise ValueError
    return int(number)


# Flag -> (key of the configuration, type of its value).
KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "output_dir": ("output_dir", str),
    "max_steps": ("trainer.max_steps", _whole),
    "gradient_accumulation_steps": ("trainer.gradient_accumulation_steps", _whole),
    "max_grad_norm": ("trainer.max_grad_norm", float),
    "seed": ("trainer.seed", _whole),
    "dataloader_num_workers": ("trainer.dataloader_num_workers", _whole),
    "run_name": ("trainer.run_name", str),
    "save_total_limit": ("trainer.save_total_limit", _whole),
    "eval_steps": ("trainer.eval_steps", _whole),
    "resume": ("trainer.resume", str),
    "resume_from_checkpoint": ("trainer.resume", str),
    **{name: (f"optim.{name}", float) for name in ("learning_rate", "min_lr_ratio", "warmup_ratio", "weight_decay",
                                                   "adam_beta1", "adam_beta2", "adam_epsilon")},
    "warmup_steps": ("optim.warmup_steps", _whole),
    "lr_scheduler_type": ("optim.lr_scheduler_type", str),
    "gradient_checkpointing": ("trainer.gradient_checkpointing", _boolean),
    "torch_compile": ("trainer.compile", _boolean),
    "device": ("trainer.device", str),
}
_SPECIAL = ("bf16", "fp16", "report_to", "evaluation_strategy", "eval_strategy", "save_strategy", "logging_steps",
            "save_steps", "optim", "use_cpu", "no_cuda", "num_train_epochs",
            "label_smoothing_factor", "fsdp", "load_best_model_at_end", "push_to_hub")
_BOOLEANS = ("bf16", "fp16", "use_cpu", "no_cuda", "load_best_model_at_end", "push_to_hub", "gradient_checkpointing",
             "torch_compile")
# Flags without a meaning here, and why.
IGNORED = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"),
                    "the data configuration sets the micro-batches, as in the original"),
    "ignore_data_skip": "the position in the data is always restored",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "data_seed": "the data configuration has the seed of the order",
    **dict.fromkeys(("log_level", "log_level_replica", "logging_dir", "logging_strategy", "logging_first_step",
                     "disable_tqdm", "log_on_each_node"), "the log is in the output folder"),
    **dict.fromkeys(("dataloader_drop_last", "dataloader_pin_memory", "group_by_length", "remove_unused_columns",
                     "dataloader_prefetch_factor", "dataloader_persistent_workers"), "batches are addressed by step"),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "local_rank",
                     "full_determinism", "tf32", "bf16_full_eval", "fp16_full_eval", "fp16_opt_level",
                     "half_precision_backend"), "the engine decides"),
    **dict.fromkeys(("overwrite_output_dir", "do_train", "do_eval", "save_safetensors", "prediction_loss_only",
                     "past_index", "save_on_each_node", "include_inputs_for_metrics", "coco_caption_root",
                     "eval_accumulation_steps", "eval_delay"), "it changes nothing here"),
}
_IGNORED_BOOLEANS = ("ignore_data_skip", "logging_first_step", "disable_tqdm", "log_on_each_node", "do_eval", "tf32",
                     "dataloader_drop_last", "dataloader_pin_memory", "group_by_length", "remove_unused_columns",
                     "ddp_find_unused_parameters", "overwrite_output_dir", "do_train", "save_safetensors",
                     "logging_nan_inf_filter", "dataloader_persistent_workers", "full_determinism",
                     "save_on_each_node", "prediction_loss_only", "bf16_full_eval", "fp16_full_eval")
# Keys that several flags, or flags of special forms, decide.
_SOURCES = {"trainer.precision": ("bf16", "fp16"), "trainer.device": ("use_cpu", "no_cuda"),
            "trainer.report_to": ("report_to",), "optim.name": ("optim",),
            "trainer.logging_steps": ("logging_steps",), "trainer.save_steps": ("save_steps", "save_strategy"),
            "trainer.eval_steps": ("evaluation_strategy", "eval_strategy")}
ALL = (*GROUPS, *KEYS, *_SPECIAL, *IGNORED)


@dataclass
class Translated:
    """What an argument list asks for.

    Attributes:
        groups: group -> file or name. values: dotted key -> value.
        rest: the arguments that are no flags, in their order.
        places: where in the list each group or key was set (-1: by the absence of a flag), and `rest_places` where the
            others stand, so that what comes later can win.
        remarks: sentences to print.
        original: whether any flag of the original was used.
    """

    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    rest_places: list[int] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    original: bool = False


def translate(arguments: Sequence[str]) -> Translated:
    """Read the original's flags; `--flag value`, `--flag=value` and, for booleans, `--flag` and `--no_flag`.

    Raises:
        ConfigError: an unknown flag (the nearest is named), no value, one of the wrong type, or what cannot be done.
    """
    found, at, made = _collect(arguments)
    for name, values in found.items():
        if name in GROUPS:
            made.groups[GROUPS[name]] = _one(name, values)
            made.places[GROUPS[name]] = at[name]
        elif name in KEYS:
            key, kind = KEYS[name]
            if name == "resume_from_checkpoint" and values == ["True"]:
                values = ["auto"]
            made.values[key] = _converted(name, _one(name, values), kind)
            made.places[key] = at[name]
        elif name in IGNORED:
            made.remarks.append(f"--{name} has no effect: {IGNORED[name]}.")
    before = set(made.values)
    _special(found, made)
    for key in made.values.keys() - before:  # of several flags the last counts
        made.places[key] = max((at[name] for name in found if name in _SOURCES.get(key, ())), default=-1)
    return made


def _collect(arguments: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, int], Translated]:
    """Flags with the words after each and their places, and the words that belong to none; of equal flags the last."""
    made = Translated()
    found: dict[str, list[str]] = {}
    at: dict[str, int] = {}
    open_flag: str | None = None
    for place, word in enumerate(arguments):
        if not word.startswith("--"):
            # A word with `=` is an override, unless a flag still needs its value (booleans need none).
            waits = open_flag is not None and not found[open_flag] and open_flag not in (*_BOOLEANS,
                                                                                         *_IGNORED_BOOLEANS)
            if open_flag is not None and ("=" not in word or waits):
                found[open_flag].append(word)
                if open_flag != "report_to":
                    open_flag = None
            else:
                made.rest.append(word)
                made.rest_places.append(place)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in ALL and name.startswith("no_") and name[3:] in (*_BOOLEANS, *_IGNORED_BOOLEANS):
            name, equals, value = name[3:], "=", "False"
        if name not in ALL:
            near = nearest(name, ALL).replace("mean '", "mean '--")
            raise ConfigError(f"--{name}: unknown option{near}.")
        found[name], at[name] = [value] if equals else [], place
        made.original = made.original or name not in ("resume", "device")
        open_flag = None if equals else name
    for name, values in found.items():
        if not values:
            if name not in (*_BOOLEANS, *_IGNORED_BOOLEANS):
                raise ConfigError(f"--{name}: needs a value.")
            values.append("True")
    return found, at, made


def _one(name: str, values: list[str]) -> str:
    if len(values) != 1:
        raise ConfigError(f"--{name}: takes one value, not {len(values)}.")
    return values[0]


def _converted(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except (ValueError, OverflowError) as error:
        what = {float: "a number", _whole: "a whole number", _boolean: "True or False"}.get(kind, "a text")
        raise ConfigError(f"--{name}: needs {what}, not {text!r}.") from error


def _special(found: dict[str, list[str]], made: Translated) -> None:
    def word(name: str, default: str) -> str:
        return _one(name, found[name]).lower() if name in found else default

    def truth(name: str) -> bool:
        return name in found and _converted(name, _one(name, found[name]), _boolean)

    if truth("bf16") and truth("fp16"):
        raise ConfigError("--bf16 and --fp16 exclude each other.")
    if made.original:
        made.values["trainer.precision"] = "bf16" if truth("bf16") else "fp16" if truth("fp16") else "fp32"
    if truth("use_cpu") or truth("no_cuda"):
        made.values["trainer.device"] = "cpu"
    _steps(found, made, word)
    if "report_to" in found:
        names = [name for text in found["report_to"] for name in text.split(",")]
        made.values["trainer.report_to"] = (["tensorboard"] if names == ["all"] else
                                            [name for name in names if name != "none"])
    if "optim" in found:
        name = word("optim", "")
        if name not in ("adamw_hf", "adamw_torch", "adamw_torch_fused", "adamw", "muon"):
            raise ConfigError(f"--optim: {name!r} is not built in; use adamw_hf (the original's), adamw_torch or muon.")
        made.values["optim.name"] = "adamw" if name.startswith("adamw_torch") else name
    for name in ("fsdp", "load_best_model_at_end", "push_to_hub", "label_smoothing_factor", "num_train_epochs"):
        if name in found and word(name, "").lower() not in (*_NO, "", "0.0"):
            instead = "use --max_steps" if name == "num_train_epochs" else "leave it out"
            raise ConfigError(f"--{name}: is not built in; {instead}.")


def _steps(found: dict[str, list[str]], made: Translated, word: Callable[[str, str], str]) -> None:
    """Flags that say when to save, log and evaluate."""
    for name in ("logging_steps", "save_steps"):
        if name in found:
            made.values[f"trainer.{name}"] = _converted(name, _one(name, found[name]), _whole)
    strategy = word("evaluation_strategy", word("eval_strategy", "no"))
    saving = word("save_strategy", "steps")
    if strategy not in ("no", "steps") or saving not in ("no", "steps"):
        raise ConfigError("Saving and evaluation go by steps here: use --save_strategy and --evaluation_strategy with "
                          "'no' or 'steps'.")
    if saving == "no":
        made.values["trainer.save_steps"] = 0
    if strategy == "no" and made.original:
        made.values["trainer.eval_steps"] = 0
    elif strategy == "steps" and "eval_steps" not in found:
        made.values["trainer.eval_steps"] = made.values.get("trainer.logging_steps", 500)
