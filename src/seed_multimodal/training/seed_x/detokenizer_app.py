"""Training of SEED-X's de-tokenizer: `python src/train/train_seed_x_detokenizer.py` with Hydra overrides.

    python src/train/train_seed_x_detokenizer.py output_dir=log/seed_x_detokenizer_stage1
    python src/train/train_seed_x_detokenizer.py model=stage2 data=stage2 trainer=stage2 output_dir=log/…
    torchrun --nproc_per_node 8 src/train/train_seed_x_detokenizer.py model=stage2 deepspeed=stage2_bf16 …
    python src/train/train_seed_x_detokenizer.py data=FILE.yaml trainer.max_steps=100 output_dir=log/mine

Also `--config-path DIR` (`-cp`), `--config-name NAME` (`-cn`), `--cfg` (print the resolved configuration and stop),
`--help`, `--debug` (tracebacks). Under torchrun every process runs it. OUTPUT_DIR/adapter is the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from seed_multimodal.training.llm.app import Application
from seed_multimodal.training.llm.app import main_process as start


def _train(config: Mapping[str, Any]) -> Any:
    from seed_multimodal.training.seed_x.detokenizer import train_detokenizer

    return train_detokenizer(config)


GROUPS = ("model", "data", "optim", "trainer", "deepspeed")
APPLICATION = Application("train_seed_x_detokenizer.py", str(__doc__), GROUPS, _train)


def main_process(configs: str | Path) -> NoReturn:
    """The training as a program."""
    start(configs, APPLICATION)
