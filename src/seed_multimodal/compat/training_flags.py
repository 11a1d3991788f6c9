"""The originals' flags for the Hydra trainings, translated into overrides by
`training_flags.yaml`.

    python src/train/train.py --model configs/model/vicuna_7b_lora.yaml --train_data … --bf16 True

Flags and overrides apply in command-line order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from seed_multimodal.config import read_table
from seed_multimodal.entry import run_and_exit
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import nearest
from seed_multimodal.training.cli import CommandLine, main

_TABLES = read_table(__file__)
FLAGS: dict[str, str] = _TABLES["flags"]
CHOICES: dict[str, dict[str, str | None]] = _TABLES["choices"]
FSDP: dict[str, str] = _TABLES["fsdp"]
UNSUPPORTED_FLAGS = (*FSDP, "load_best_model_at_end", "push_to_hub", "label_smoothing_factor")
IGNORED_FLAGS: list[str] = _TABLES["ignored"]
_ALL_FLAGS = (*FLAGS, *UNSUPPORTED_FLAGS, *IGNORED_FLAGS)
_SWITCHES = (*_TABLES["switches"], *UNSUPPORTED_FLAGS, *IGNORED_FLAGS)  # their value is optional
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
        if not argument.startswith("--") or flag in _TABLES["hydra"]:
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
        default_interval = str(CHOICES["eval_strategy"]["steps"])
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
    value: str | None = _TABLES["synonyms"].get(flag, {}).get(typed, typed)
    if flag in CHOICES:
        choices = CHOICES[flag]
        if typed.lower() not in choices:
            raise ConfigError(f"--{flag}: must be one of {', '.join(choices)}, not {typed!r}.")
        value = choices[typed.lower()]
    if flag not in FLAGS or value is None:
        return []
    text = json.dumps(value, ensure_ascii=False)
    return [template.format(value=value, text=text) for template in FLAGS[flag].split()]
