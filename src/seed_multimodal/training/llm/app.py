"""The training application: `python src/train/train.py` with Hydra overrides or the original's flags.

    python src/train/train.py model=nano_lora tokenizer=nano data=my_data.yaml trainer.max_steps=100 output_dir=log/run
    python src/train/train.py --model configs/model/vicuna_7b_lora.yaml --train_data … --deepspeed … --bf16 True

Beside overrides and flags: `--config-path DIR` (`-cp`), `--config-name NAME` (`-cn`), `--cfg` (print the resolved
configuration and stop), `--help`, `--debug` (tracebacks). Under torchrun every process runs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from seed_multimodal.entry import guarded, run_and_exit
from seed_multimodal.errors import ConfigError
from seed_multimodal.training.llm.compose import GROUPS, SEED_X_GROUPS, compose, group_folder
from seed_multimodal.training.llm.flags import translate


@dataclass(frozen=True)
class Application:
    """A training with a command line of this kind.

    Attributes:
        program: its name. usage: for `--help`. groups: of its configurations.
        train: trains by a resolved configuration. flags: whether the original's flags have a meaning for it.
        config_name: of its configuration, unless `--config-name` names another.
    """

    program: str
    usage: str
    groups: Sequence[str]
    train: Callable[[Mapping[str, Any]], Any]
    flags: bool = False
    config_name: str = "train"


def _train_llm(config: Mapping[str, Any]) -> Any:
    from seed_multimodal.training.llm.train import train_llm

    return train_llm(config)


LLM = Application("train.py", str(__doc__), [one for one in GROUPS if one not in SEED_X_GROUPS], _train_llm,
                  flags=True)


def main(argv: Sequence[str] | None = None, configs: str | Path = "configs", application: Application = LLM) -> int:
    """Compose and train; returns the exit code (2: refused or failed, with one sentence on stderr; 143: SIGTERM).

    Args:
        configs: folder of the configurations unless `--config-path` names another.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    rank = os.environ.get("RANK")
    program = application.program if rank in (None, "0") else f"{application.program} (rank {rank})"
    return guarded(program, "--debug" in arguments, lambda: run(arguments, Path(configs), application))


def main_process(configs: str | Path, application: Application = LLM) -> NoReturn:
    """`main` as a program."""
    run_and_exit(lambda: main(configs=configs, application=application))


def run(arguments: Sequence[str], configs: Path, application: Application = LLM) -> int:
    """As `main`, with refusals raised."""
    given = translate(arguments)
    own = given.options
    folder = Path(own.config_path) if own.config_path else configs
    if own.help:
        print(help_text(folder, application))
        return 0
    if given.original and not application.flags:
        raise ConfigError("This training takes overrides (trainer.max_steps=10), not the flags of the "
                          "language model's training; see --help.")
    composed = compose(arguments, folder, own.config_name or application.config_name, whole=not own.cfg)
    if own.cfg:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(composed.config)), end="")
        return 0
    if os.environ.get("RANK", "0") == "0":
        for remark in composed.remarks:
            print(f"[train] {remark}", flush=True)
    application.train(composed.config)
    return 0


def help_text(configs: Path, application: Application = LLM) -> str:
    """Usage and the groups' configurations."""
    lines = [application.usage.strip(), "", f"Configurations in {configs}:"]
    for group in application.groups:
        folder = group_folder(configs, group)
        names = sorted(path.stem for path in folder.glob("*") if path.suffix in (".yaml", ".json"))
        lines.append(f"  {group}: {', '.join(names) or '-'}")
    return "\n".join(lines)
