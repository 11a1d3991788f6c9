"""Unified pre-training of LaVIT (stage 2): `python src/train/train_lavit.py` with Hydra overrides.

    python src/train/train_lavit.py output_dir=log/lavit deepspeed=configs/deepspeed/stage2_bf16.json
    python src/train/train_lavit.py data=my_data.yaml visual_encoder.path=pretrained/lavit output_dir=log/lavit
    python src/train/train_lavit.py … eval_data=my_held_out.yaml trainer.eval_steps=500

Also `--config-path DIR` (`-cp`), `--config-name NAME` (`-cn`), `--cfg` (print the resolved configuration and stop),
`--help`, `--debug` (tracebacks). Under torchrun every process runs it. OUTPUT_DIR/checkpoint-N is a `language_model`
folder of a LaVIT: put it (or a link to it) beside `visual_tokenizer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from seed_multimodal.training.llm.app import Application
from seed_multimodal.training.llm.app import main_process as start
from seed_multimodal.training.llm.compose import GROUPS


def _train(config: Mapping[str, Any]) -> Any:
    from seed_multimodal.training.lavit.pretrain_task import PretrainTask
    from seed_multimodal.training.llm.train import train_llm

    return train_llm(config, PretrainTask)


APPLICATION = Application("train_lavit.py", str(__doc__), [one for one in GROUPS if one != "agent"], _train,
                          config_name="train_lavit")


def main_process(configs: str | Path) -> NoReturn:
    """The training as a program."""
    start(configs, APPLICATION)
