"""The Hydra trainings of all families: a configuration composed from groups and overrides.

    python src/train/train.py model=nano_lora tokenizer=nano data=my_data.yaml output_dir=log/run
    python -m seed_multimodal.training.cli NAME …    # of a family in another package

A group (model, data, …) is set to the name of one of its configurations or the path of a file.
Overrides apply in command-line order; the last one wins, and a group's file replaces earlier
settings of the group. The original's flags are translated into overrides
(`compat.training_flags`).

Further options: `--config-path DIR` (`-cp`), `--config-name NAME` (`-cn`), `--cfg` (print the
resolved configuration and exit), `--help`, `--debug` (tracebacks). Under torchrun every process
runs it.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seed_multimodal.config import from_compat, read_yaml, resolve
from seed_multimodal.disk import read_json_object
from seed_multimodal.entry import rank_and_world_size, run_and_exit, run_guarded
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
SWITCHES = ("c", "cfg", "h", "help", "debug")  # options whose value is optional


# ------------------------------------------------------------------------------- the command line


class CommandLine(NamedTuple):
    """A parsed command line.

    overrides: in order.
    options: values of `OPTIONS`.
    ignored: flags without effect.
    original: whether the files of groups are the original's unless chosen (`original.yaml`).
    """

    overrides: list[str]
    options: dict[str, str]
    ignored: Sequence[str] = ()
    original: bool = False


def is_flag(argument: str) -> bool:
    """Whether an argument is a flag, not an override or a negative number."""
    return argument.startswith("-") and not argument[1:2].isdigit()


def read_flag(
    argument: str,
    remaining: list[str],
    flags: Collection[str],
    switches: Collection[str],
    lists: Collection[str] = (),
) -> tuple[str, str]:
    """A flag's name and value, consumed from the remaining arguments.

    flags: all names.
    switches: those whose value is optional. An override after one is not its value.
    lists: those with several values.

    Raises ConfigError: an unknown flag, or one without value.
    """
    # 1. The flag, or the negation of a switch.
    flag, equals, value = argument.lstrip("-").partition("=")
    flag = flag.replace("-", "_")
    if flag not in flags:
        positive = flag.removeprefix("no_")
        if positive in switches:
            return positive, "False"
        hint = nearest(f"--{flag}", [f"--{name}" for name in flags])
        raise ConfigError(f"--{flag}: unknown option{hint}.")
    if equals:
        return flag, value

    # 2. Its values.
    values: list[str] = []
    while remaining and not is_flag(remaining[0]) and (not values or flag in lists):
        is_override = "=" in remaining[0] or remaining[0].startswith("~")
        if is_override and (values or flag in switches):
            break
        values.append(remaining.pop(0))
    if values:
        return flag, ",".join(values)
    if flag not in switches:
        raise ConfigError(f"--{flag}: needs a value.")
    return flag, "True"


# ------------------------------------------------------------------------------------ the program


def main(program: str, configs: str | Path, argv: Sequence[str] | None = None) -> int:
    """Compose the configuration and train; returns the exit code (2: error, printed to stderr; 143:
    SIGTERM)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_guarded(
        f"{program}.py",
        "--debug" in arguments,
        lambda: run(program, Path(configs), from_compat("training_flags:translate")(arguments)),
    )


def run(program: str, configs: Path, command: CommandLine) -> int:
    """As `main`, but raises errors."""
    training = find_training(program)
    file = configs / f"{training.config}.yaml"
    folder = Path(command.options.get("config_path", file.parent))
    name = command.options.get("config_name", file.stem).removesuffix(".yaml")
    # Imported late, since a wrong flag should not wait for torch.
    task_type: type[RunTask] = pkgutil.resolve_name(training.task)

    # Only print, if asked for.
    if "help" in command.options:
        print(help_text(folder / f"{name}.yaml", task_type.run_type.groups()))
        return 0
    only_print = "cfg" in command.options
    config = compose(command, folder, name, require_all=not only_print)
    if only_print:
        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return 0

    # Train.
    if command.ignored and rank_and_world_size()[0] == 0:
        print(f"[train] ignored: {', '.join(command.ignored)}.", flush=True)
    task_type.train(config)
    return 0


def help_text(file: Path, groups: Mapping[str, tuple[Any, bool]]) -> str:
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
    for group, (group_type, is_required) in groups.items():
        if is_required:
            lines += [f"  {line}" for line in describe_settings(group_type, group)]
    return "\n".join(lines)


# ----------------------------------------------------------------------- overrides -> configuration


def compose(
    command: CommandLine, folder: str | Path, name: str = "train", *, require_all: bool = True
) -> dict[str, Any]:
    """A command line → the resolved configuration of `NAME.yaml`, whose `defaults` or `files`
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


if __name__ == "__main__":
    name = "".join(sys.argv[1:2])  # without one, the error lists them all
    run_and_exit(lambda: main(name, "configs", sys.argv[2:]))
