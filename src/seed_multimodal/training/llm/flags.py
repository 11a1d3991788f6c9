"""The command line of training: the original's flags (`--model X.yaml --max_steps 30000 --bf16 True …`), our own
options, and overrides (`trainer.max_steps=10`).

argparse reads the flags of the original's `train.py`, its own and those of transformers' `TrainingArguments`;
`translate` turns them into settings of ours. Booleans are written as `HfArgumentParser` takes them: `--bf16`,
`--bf16 True`, `--no_bf16`. Flags that mean nothing here (the data order is always restored, for example) are accepted
with a remark; unsupported ones are refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest

# Flags that name a file (or one of the group's configurations) -> the group.
GROUPS = {"model": "model", "tokenizer": "tokenizer", "train_data": "data", "eval_data": "eval_data",
          "deepspeed": "deepspeed",
          # SEED-X's
          "llm_model": "model", "train_dataset": "data", "deepspeed_plugin": "deepspeed", "agent_model": "agent",
          "visual_encoder": "visual_encoder"}
_YES, _NO = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")


def _boolean(text: str) -> bool:
    if text.lower() not in (*_YES, *_NO):
        raise argparse.ArgumentTypeError(f"needs True or False, not {text!r}.")
    return text.lower() in _YES


def _whole(text: str) -> int:
    try:
        if (number := float(text)) == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"needs a whole number, not {text!r}.")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"needs a number, not {text!r}.") from error


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"needs a JSON object, as {{\"power\": 2}}, not {text!r}.")
    return found


# Flag -> (key of the configuration, type of its value).
KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "output_dir": ("output_dir", str),
    "max_steps": ("trainer.max_steps", _whole),
    "gradient_accumulation_steps": ("trainer.gradient_accumulation_steps", _whole),
    "max_grad_norm": ("trainer.max_grad_norm", float),
    "seed": ("trainer.seed", _whole),
    "dataloader_num_workers": ("trainer.dataloader_num_workers", _whole),
    "run_name": ("trainer.run_name", str),
    "expr_name": ("trainer.run_name", str),
    "save_total_limit": ("trainer.save_total_limit", _whole),
    "eval_steps": ("trainer.eval_steps", _whole),
    "resume": ("trainer.resume", str),
    "resume_from_checkpoint": ("trainer.resume", str),
    **{name: (f"optim.{name}", _number) for name in ("learning_rate", "min_lr_ratio", "warmup_ratio", "weight_decay",
                                                   "adam_beta1", "adam_beta2", "adam_epsilon")},
    "warmup_steps": ("optim.warmup_steps", _whole),
    "lr_scheduler_type": ("optim.lr_scheduler_type", str),
    "lr_scheduler_kwargs": ("optim.lr_scheduler_kwargs", _mapping),
    "gradient_checkpointing": ("trainer.gradient_checkpointing", _boolean),
    "torch_compile": ("trainer.compile", _boolean),
    "device": ("trainer.device", str),
}
# Flags that several keys, or values of special forms, follow from -> type of the value.
_SPECIAL: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("bf16", "fp16", "use_cpu", "no_cuda"), _boolean),
    **dict.fromkeys(("logging_steps", "save_steps"), _whole),
    **dict.fromkeys(("report_to", "evaluation_strategy", "eval_strategy", "save_strategy", "optim", "num_train_epochs",
                     "label_smoothing_factor", "fsdp",
                     "mixed_precision", "fsdp_plugin", "load_best_model_at_end", "push_to_hub"), str.lower)}
# Flags without a meaning here, and why.
IGNORED = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"),
                    "the data configuration sets the micro-batches, as in the original"),
    "coco_caption_root": "a checkpoint is captioned and scored by eval/eval_caption.py",
    "ignore_data_skip": "the position in the data is always restored",
    "batch_size": "the data configuration sets the micro-batches, as in the original",
    "project_name": "the original never reads it",
    "resume_steps": "the position in the data is always restored",
    "image_transform": "the data configuration has the size of views (base_resolution); they are normalised as CLIP's",
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
                     "past_index", "save_on_each_node", "include_inputs_for_metrics",
                     "eval_accumulation_steps", "eval_delay"), "it changes nothing here"),
}
_REFUSED = ("fsdp", "fsdp_plugin", "load_best_model_at_end", "push_to_hub", "label_smoothing_factor",
            "num_train_epochs")
_BARE = ("load_best_model_at_end", "push_to_hub", *IGNORED)  # may stand without a value, beside what is _boolean
# Keys that several flags, or flags of special forms, decide.
_SOURCES = {"trainer.precision": ("bf16", "fp16", "mixed_precision"), "trainer.device": ("use_cpu", "no_cuda"),
            "trainer.report_to": ("report_to",), "optim.name": ("optim",),
            "trainer.logging_steps": ("logging_steps",), "trainer.save_steps": ("save_steps", "save_strategy"),
            "trainer.eval_steps": ("evaluation_strategy", "eval_strategy")}
_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(GROUPS, str), **{name: kind for name, (_, kind) in KEYS.items()}, **_SPECIAL,
    **dict.fromkeys(IGNORED, str)}
_OWN = ("resume", "device")  # ours: they do not bring the original's defaults


@dataclass
class Translated:
    """An argument list as settings.

    Attributes:
        groups: group -> file or name. values: dotted key -> value.
        rest: the overrides, in their order.
        places: where in the list each group or key was set (-1: by the absence of a flag), and `rest_places` where the
            others stand, so that what comes later can win.
        remarks: sentences to print.
        original: whether any flag of the original was used.
        options: the application's own: config_path, config_name, cfg, help, debug.
    """

    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)
    rest_places: list[int] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    original: bool = False
    options: argparse.Namespace = field(default_factory=argparse.Namespace)


class _Parser(argparse.ArgumentParser):
    """argparse whose refusals are `ConfigError`s of one sentence."""

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ").replace("expected one argument", "needs a value.")
        raise ConfigError(text.replace("expected at least one argument", "needs a value."))


class _InOrder(argparse.Action):
    """Keeps each flag's value in the order of the command line, of equal flags the last."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        namespace.order.append((self.dest, values))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--config_path", "--config_dir", "-cp", "-cd")
    parser.add_argument("--config_name", "-cn", type=lambda name: name.removesuffix(".yaml"))
    parser.add_argument("--cfg", "-c", nargs="?", const="job", choices=["job"])
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--override", action=_InOrder)
    for name, kind in _TYPES.items():
        bare = kind is _boolean or name in _BARE
        more: dict[str, Any] = {"nargs": "?", "const": True if kind is _boolean else "true"} if bare else {}
        if name == "report_to":
            more = {"nargs": "+"}
        parser.add_argument(f"--{name}", action=_InOrder, type=kind, **more)
    return parser


def translate(arguments: Sequence[str]) -> Translated:
    """Read a command line; `--flag value`, `--flag=value` and, for booleans, `--flag` and `--no_flag`.

    Raises:
        ConfigError: an unknown flag (the nearest is named), no value, one of the wrong type, or what cannot be done.
    """
    options, unknown = _parser().parse_known_args(_marked(arguments), argparse.Namespace(order=[]))
    for word in unknown:
        if word.startswith("-"):
            name = word.lstrip("-").partition("=")[0]
            near = nearest(name, _TYPES).replace("mean '", "mean '--")
            raise ConfigError(f"--{name}: unknown option{near}.")
    made = Translated(options=options, rest=unknown, rest_places=[-1] * len(unknown))
    found: dict[str, Any] = {}
    at: dict[str, int] = {}
    for place, (name, value) in enumerate(options.order):
        if name == "override":
            made.rest.append(value)
            made.rest_places.append(place)
            continue
        found[name], at[name] = value, place
        made.original = made.original or name not in _OWN
    for name, value in found.items():
        if name in GROUPS:
            made.groups[GROUPS[name]] = value
            made.places[GROUPS[name]] = at[name]
        elif name in KEYS:
            key = KEYS[name][0]
            made.values[key] = "auto" if (name, value) == ("resume_from_checkpoint", "True") else value
            made.places[key] = at[name]
        elif name in IGNORED:
            made.remarks.append(f"--{name} has no effect: {IGNORED[name]}.")
    before = set(made.values)
    _special(found, made)
    for key in made.values.keys() - before:  # of several flags the last counts
        made.places[key] = max((at[name] for name in found if name in _SOURCES.get(key, ())), default=-1)
    return made


def _marked(arguments: Sequence[str]) -> list[str]:
    """The argument list as argparse takes it: overrides as options of their own, so that none becomes the value of a
    boolean before it, names with underscores, `--no_flag` as `--flag=False`."""
    marked: list[str] = []
    waits = False  # for the value of the flag before
    for word in arguments:
        if word.startswith("-") and len(word) > 1 and not word[1].isdigit():
            name, equals, value = word.partition("=")
            plain = name.lstrip("-").replace("-", "_")
            if name.startswith("--no_") and _may_be_bare(plain.removeprefix("no_")) and plain not in _TYPES:
                plain, equals, value = plain.removeprefix("no_"), "=", "False"
            waits = not equals and not _may_be_bare(plain) and plain not in ("cfg", "help", "debug")
            marked.append(("--" + plain if name.startswith("--") else name) + equals + value)
        elif ("=" in word or word.startswith("~")) and not waits:
            marked.append(f"--override={word}")
        else:
            marked.append(word)
            waits = False
    return marked


def _may_be_bare(name: str) -> bool:
    return name in _BARE or _TYPES.get(name) is _boolean


def _special(found: dict[str, Any], made: Translated) -> None:
    """Keys that follow from several flags, or from the absence of one."""
    if found.get("bf16") and found.get("fp16"):
        raise ConfigError("--bf16 and --fp16 exclude each other.")
    if made.original:
        mixed = found.get("mixed_precision", "no")
        if mixed not in ("no", "bf16", "fp16"):
            raise ConfigError(f"--mixed_precision: needs no, bf16 or fp16, not {mixed!r}.")
        mixed = "fp32" if mixed == "no" else mixed
        made.values["trainer.precision"] = "bf16" if found.get("bf16") else "fp16" if found.get("fp16") else mixed
    if found.get("use_cpu") or found.get("no_cuda"):
        made.values["trainer.device"] = "cpu"
    for name in ("logging_steps", "save_steps"):
        if name in found:
            made.values[f"trainer.{name}"] = found[name]
    strategy = found.get("evaluation_strategy", found.get("eval_strategy", "no"))
    saving = found.get("save_strategy", "steps")
    if strategy not in ("no", "steps") or saving not in ("no", "steps"):
        raise ConfigError("Saving and evaluation go by steps here: use --save_strategy and --evaluation_strategy with "
                          "'no' or 'steps'.")
    if saving == "no":
        made.values["trainer.save_steps"] = 0
    if strategy == "no" and made.original:
        made.values["trainer.eval_steps"] = 0
    elif strategy == "steps" and "eval_steps" not in found:
        made.values["trainer.eval_steps"] = made.values.get("trainer.logging_steps", 500)
    if "report_to" in found:
        names = [name for text in found["report_to"] for name in text.split(",")]
        made.values["trainer.report_to"] = (["tensorboard"] if names == ["all"] else
                                            [name for name in names if name != "none"])
    if "optim" in found:
        name = str(found["optim"])
        if name not in ("adamw_hf", "adamw_torch", "adamw_torch_fused", "adamw", "muon"):
            raise ConfigError(f"--optim: {name!r} is not built in; use adamw_hf (the original's), adamw_torch or muon.")
        made.values["optim.name"] = "adamw" if name.startswith("adamw_torch") else name
    if "num_train_epochs" in found and "max_steps" in found:  # which wins, as in the original
        del found["num_train_epochs"]
    for name in _REFUSED:
        if found.get(name, "") not in (*_NO, "", "0.0"):
            instead = "use --max_steps" if name == "num_train_epochs" else "leave it out"
            raise ConfigError(f"--{name}: is not built in; {instead}.")
