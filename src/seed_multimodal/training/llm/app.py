"""The training application: `python src/train/train.py` with Hydra overrides or the original's flags.

    python src/train/train.py model=nano_lora tokenizer=nano data=my_data.yaml trainer.max_steps=100 output_dir=log/run
    python src/train/train.py --model configs/model/vicuna_7b_lora.yaml --train_data … --deepspeed … --bf16 True

Beside overrides and flags: `--config-path DIR` (`-cp`), `--config-name NAME` (`-cn`), `--cfg` (print the resolved
configuration and stop), `--help`, `--debug` (tracebacks). Under torchrun every process runs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from seed_multimodal.entry import guarded, run_and_exit
from seed_multimodal.training.llm.compose import GROUPS, compose
from seed_multimodal.training.llm.flags import translate

PROGRAM = "train.py"


def main(argv: Sequence[str] | None = None, configs: str | Path = "configs") -> int:
    """Compose and train; returns the exit code (2: refused or failed, with one sentence on stderr; 143: SIGTERM).

    Args:
        configs: folder of the configurations unless `--config-path` names another.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    rank = os.environ.get("RANK")
    program = PROGRAM if rank in (None, "0") else f"{PROGRAM} (rank {rank})"
    return guarded(program, "--debug" in arguments, lambda: run(arguments, Path(configs)))


def main_process(configs: str | Path) -> NoReturn:
    """`main` as a program."""
    run_and_exit(lambda: main(configs=configs))


def run(arguments: Sequence[str], configs: Path) -> int:
    """As `main`, with refusals raised."""
    own = translate(arguments).options
    folder = Path(own.config_path) if own.config_path else configs
    if own.help:
        print(help_text(folder))
        return 0
    composed = compose(arguments, folder, own.config_name, whole=not own.cfg)
    if own.cfg:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(composed.config)), end="")
        return 0
    from seed_multimodal.training.llm.train import train_llm

    if os.environ.get("RANK", "0") == "0":
        for remark in composed.remarks:
            print(f"[train] {remark}", flush=True)
    train_llm(composed.config)
    return 0


def help_text(configs: Path) -> str:
    """Usage and the groups' configurations."""
    lines = [str(__doc__).strip(), "", f"Configurations in {configs}:"]
    for group in GROUPS:
        folder = configs / ("data" if group == "eval_data" else group)
        names = sorted(path.stem for path in folder.glob("*") if path.suffix in (".yaml", ".json"))
        lines.append(f"  {group}: {', '.join(names) or '-'}")
    return "\n".join(lines)
