"""Training of LaVIT's pixel decoders: `python src/train/train_lavit_detokenizer.py` with Hydra overrides.

    python src/train/train_lavit_detokenizer.py output_dir=log/lavit_highres
    python src/train/train_lavit_detokenizer.py model=lowres data=lowres trainer=lowres output_dir=log/lavit_lowres
    torchrun --nproc_per_node 8 src/train/train_lavit_detokenizer.py deepspeed=stage2_bf16 output_dir=log/…
    python src/train/train_lavit_detokenizer.py data=FILE.yaml trainer.max_steps=100 output_dir=log/mine

Also `--config-path DIR` (`-cp`), `--config-name NAME` (`-cn`), `--cfg` (print the resolved configuration and stop),
`--help`, `--debug` (tracebacks). Under torchrun every process runs it. OUTPUT_DIR/pixels is the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from seed_multimodal.training.llm.app import Application
from seed_multimodal.training.llm.app import main_process as start


def _train(config: Mapping[str, Any]) -> Any:
    from seed_multimodal.training.lavit.detokenizer import train_lavit_detokenizer

    return train_lavit_detokenizer(config)


GROUPS = ("model", "data", "optim", "trainer", "deepspeed")
APPLICATION = Application("train_lavit_detokenizer.py", str(__doc__), GROUPS, _train)


def main_process(configs: str | Path) -> NoReturn:
    """The training as a program."""
    start(configs, APPLICATION)
