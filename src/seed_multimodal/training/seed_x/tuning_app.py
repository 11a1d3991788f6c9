"""Instruction tuning of SEED-X: `python src/train/train_seed_x_sft.py` with Hydra overrides or the original's flags.

    python src/train/train_seed_x_sft.py output_dir=log/seed_x_sft deepspeed=configs/accelerate/deepspeed_stage_3.yaml
    python src/train/train_seed_x_sft.py data=sft_edit output_dir=log/seed_x_edit
    python src/train/train_seed_x_sft.py … eval_data=my_held_out.yaml trainer.eval_steps=500
    python src/train/train_seed_x_sft.py --llm_model … --agent_model … --train_dataset … --deepspeed_plugin …

Also `--config-path DIR` (`-cp`), `--config-name NAME` (`-cn`), `--cfg` (print the resolved configuration and stop),
`--help`, `--debug` (tracebacks). Under torchrun every process runs it. OUTPUT_DIR/checkpoint-N is an agent that SEED-X
loads (`pretrained_model_path`); `src/tools/merge_lora_weights.py` makes a system's `llm` and `agent` of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from seed_multimodal.training.llm.app import Application
from seed_multimodal.training.llm.app import main_process as start
from seed_multimodal.training.llm.compose import GROUPS


def _train(config: Mapping[str, Any]) -> Any:
    from seed_multimodal.training.llm.train import train_llm
    from seed_multimodal.training.seed_x.tuning_task import TuningTask

    return train_llm(config, TuningTask)


APPLICATION = Application("train_seed_x_sft.py", str(__doc__), GROUPS, _train, flags=True,
                          config_name="train_seed_x_sft")


def main_process(configs: str | Path) -> NoReturn:
    """The training as a program."""
    start(configs, APPLICATION)
