"""The Hydra trainings of all families.

    python src/train/train.py model=nano_lora tokenizer=nano data=my_data.yaml output_dir=log/run
    python src/train/train.py --multirun optim.learning_rate=1e-4,2e-4 output_dir=log/rates …
    python -m seed_multimodal.training.cli NAME …    # of a family in another package

The program is Hydra's own: groups, `--help`, `--cfg job`, `--info`, `--multirun`. Before it reads
the command line, three things are translated: a group may be set to any file (YAML, JSON), its last
choice wins, and a key is set whether the files have it or not (`++`). The original's flags are
translated, too (`compat.training_flags`).

The runs of a `--multirun` go to output_dir/0, output_dir/1, … Under torchrun every process runs the
program. `--debug` shows tracebacks.
"""

from __future__ import annotations

import os
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from seed_multimodal.config import (
    from_compat,
    project_path,
    project_root_variable,
    read_yaml,
    resolve,
)
from seed_multimodal.disk import read_json_object
from seed_multimodal.entry import rank_and_world_size, run_and_exit, run_guarded
from seed_multimodal.errors import ConfigError, first_line
from seed_multimodal.models.registry import find_training
from seed_multimodal.settings import describe_settings, nearest

if TYPE_CHECKING:
    from seed_multimodal.training.hydra_task import RunTask

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
SUFFIXES = (".yaml", ".yml", ".json")
PATH_OPTIONS = ("--config-path", "--config_path", "-cp")
NAME_OPTIONS = ("--config-name", "--config_name", "-cn")
# Hydra writes no folder and no log of its own.
HYDRA_SETTINGS = (
    "hydra.run.dir=.",
    "hydra.sweep.dir=${output_dir}",
    "hydra.sweep.subdir=${hydra.job.num}",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


class CommandLine(NamedTuple):
    """A command line in which the original's flags are overrides.

    arguments: Hydra's options and overrides.
    ignored: flags without effect.
    original: whether the files of groups are the original's unless chosen (`original.yaml`).
    """

    arguments: Sequence[str]
    ignored: Sequence[str] = ()
    original: bool = False


def main(program: str, configs: str | Path, argv: Sequence[str] | None = None) -> int:
    """Compose the configuration and train; returns the exit code (2: error, printed to stderr; 143:
    SIGTERM)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    guarded = partial(run_guarded, f"{program}.py", "--debug" in arguments)

    def run() -> int:
        translate = from_compat("training_flags:translate")
        command = translate([argument for argument in arguments if argument != "--debug"])
        training = find_training(program)
        task_type: type[RunTask] = pkgutil.resolve_name(training.task)
        options, overrides, file = hydra_arguments(
            command, Path(configs) / f"{training.config}.yaml"
        )
        if "--help" in options or "-h" in options:
            overrides.append(_store_help(file, task_type.run_type.groups()))

        def train(config: DictConfig) -> int:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                config.output_dir = HydraConfig.get().runtime.output_dir
            settings = plain_config(config, file)
            if command.ignored and rank_and_world_size()[0] == 0:
                print(f"[train] ignored: {', '.join(command.ignored)}.", flush=True)
            task_type.train(settings)
            return 0

        def job(config: DictConfig) -> None:
            code = guarded(lambda: train(config))
            if code:  # Hydra would print the traceback of an exception
                sys.exit(code)

        sys.argv = [f"{program}.py", *options, *HYDRA_SETTINGS, *overrides]
        hydra_main = hydra.main(
            config_path=str(file.parent.resolve()), config_name=file.stem, version_base="1.3"
        )
        with project_root_variable(file.parent), configuration_errors():
            hydra_main(job)()
        return 0

    sys_argv = sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise errors of the configuration
    try:
        return guarded(run)
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = sys_argv


# ----------------------------------------------------------------------- command line -> Hydra's


def hydra_arguments(command: CommandLine, file: Path) -> tuple[list[str], list[str], Path]:
    """Hydra's options, its overrides, and the configuration's file (default: `file`).

    Raises ConfigError: a file that is missing.
    """
    # 1. The configuration, and options of Hydra.
    folder, name = file.parent, file.stem
    options: list[str] = []
    settings: list[str] = []
    arguments = iter(command.arguments)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in (*PATH_OPTIONS, *NAME_OPTIONS):
            value = value if equals else next(arguments, "")
            if key in PATH_OPTIONS:
                folder = Path(value)
            else:
                name = value.removesuffix(".yaml")
        elif argument.startswith("-") or not (equals or argument.startswith("~")):
            options.append(argument)
        else:
            settings.append(argument)
    file = folder / f"{name}.yaml"
    if not file.is_file():
        raise ConfigError(f"{file}: no such configuration file (--config-path, --config-name).")

    # 2. Settings, and the files of groups: those of all trainings and of the configuration.
    # The key of a group in the configuration's defaults: `clm_models@model`.
    keys: dict[str, str] = {}
    for entry in read_yaml(file).get("defaults", []):
        if isinstance(entry, Mapping):
            keys.update((str(key).rpartition("@")[2], str(key)) for key in entry)
    choices: dict[str, str] = {}
    overrides: list[str] = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in GROUPS or key in keys:
            choices[key] = value
        else:
            is_key = key[0] not in "+~" and "@" not in key and not re.match("hydra[./]", key)
            overrides.append(f"++{setting}" if is_key else setting)

    # 3. Files of the original's flags, unless they are chosen.
    if command.original:
        original = "original" if name == "train" else f"{name}_original"
        for group in ("optim", "trainer"):
            if (folder / group / f"{original}.yaml").is_file():
                choices.setdefault(group, original)
    for group, choice in choices.items():
        key = keys.get(group, f"+{FOLDERS.get(group, group)}@{group}")
        if choice.lower() not in ("", "none", "null"):
            names = [_stored_name(folder, key.strip("+"), part) for part in choice.split(",")]
            overrides.append(f"{key}={','.join(names)}")
        elif group in keys:
            overrides.append(f"~{key}")
        elif not (folder / FOLDERS.get(group, group)).is_dir():
            overrides.append(f"++{group}=null")  # is refused as a key that the training lacks
    return options, overrides, file


def _stored_name(configs: Path, key: str, choice: str) -> str:
    """Hydra's name of a group's configuration: a file of the group, or any other, which is stored.

    Raises ConfigError: no such file.
    """
    folder_name, _, group = key.partition("@")
    folder = configs / folder_name
    if (folder / f"{choice}.yaml").is_file():
        return choice
    content = _file_content(configs, folder_name, group or folder_name, choice)
    name = re.sub(r"\W+", "_", str(Path(choice).absolute()))
    ConfigStore.instance().store(name, content, folder_name)
    return name


def _file_content(configs: Path, folder_name: str, group: str, choice: str) -> Any:
    """The content of a file by its path, or by its name in a folder of the configurations or next
    to them (DeepSpeed); of a tokenizer's folder the setting."""
    relative = choice.removeprefix("SEED-X/")  # prefix of the original's file names
    folders = [configs / folder_name, configs.parent / folder_name]
    roots = [Path(), *folders, configs.parent, configs.parent.parent]
    candidates = [root / f"{relative}{suffix}" for root in roots for suffix in ("", *SUFFIXES)]
    file = next(filter(Path.is_file, [Path(choice), *candidates]), None)
    if file is None:
        if group == "tokenizer" and (project_path(choice) / "tokenizer.model").is_file():
            return {"pretrained_model_name_or_path": choice}
        files = [file for folder in folders for file in folder.glob("*")]
        names = sorted(file.stem for file in files if file.suffix in SUFFIXES)
        raise ConfigError(
            f"{group}={choice}: no such file, and no such configuration in {folders[0]}"
            f"{nearest(Path(choice).stem, names)}; it has {', '.join(names) or 'none'}."
        )
    if file.suffix == ".json":
        return read_json_object(file, ConfigError)
    content = read_yaml(file)
    # SEED-X's files of accelerate name DeepSpeed's JSON.
    if "hf_ds_config" in content:
        return _file_content(configs, folder_name, group, str(content["hf_ds_config"]))
    return content


def _store_help(file: Path, groups: Mapping[str, tuple[Any, bool]]) -> str:
    """Store the text of `--help`: the configuration's first comment, Hydra's options and groups,
    and the keys with their defaults. Returns the override that uses it."""
    header: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line[1:].removeprefix(" "))
    keys = ["Keys and defaults (overridden by a group's file; ???: required):", "  output_dir=???"]
    for group, (group_type, is_required) in groups.items():
        if is_required:
            keys += [f"  {line}" for line in describe_settings(group_type, group)]
    texts = ["\n".join(header), "$FLAGS_HELP", "$APP_CONFIG_GROUPS", "\n".join(keys)]
    ConfigStore.instance().store("training", {"template": "\n\n".join(texts)}, "hydra/help")
    return "hydra/help=training"


# --------------------------------------------------------------------------------- configuration


def plain_config(config: DictConfig, file: Path) -> dict[str, Any]:
    """A composed configuration, resolved.

    file: that of the configuration. Raises ConfigError: a required value is missing.
    """
    with configuration_errors():
        plain: Any = OmegaConf.to_container(resolve(config, file), throw_on_missing=True)
    return {str(key): value for key, value in plain.items()}


@contextmanager
def configuration_errors() -> Iterator[None]:
    """Convert errors of Hydra and OmegaConf into ConfigError."""
    try:
        yield
    except MissingMandatoryValue as error:
        raise ConfigError(f"configuration: {error.full_key} is required.") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{first_line(error).rstrip('.')}; values with characters like = ( ) ' need inner "
            f"quotes: 'key=\"value\"'."
        ) from error


if __name__ == "__main__":
    name = "".join(sys.argv[1:2])  # without one, the error lists them all
    run_and_exit(lambda: main(name, "configs", sys.argv[2:]))
