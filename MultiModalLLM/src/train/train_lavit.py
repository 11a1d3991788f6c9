"""Pre-train LaVIT on pictures and text (stage 2), alone or as one of torchrun's processes; Hydra overrides.

    python src/train/train_lavit.py data=my_data.yaml output_dir=log/run   (or `--help`)
"""

from __future__ import annotations

import sys
from pathlib import Path

APPLICATION = Path(__file__).resolve().parents[2]
LIBRARY = APPLICATION.parent / "src"
if str(LIBRARY) not in sys.path:  # runs from a checkout that is not installed
    sys.path.insert(0, str(LIBRARY))

from seed_multimodal.training.lavit.pretrain_app import main_process  # noqa: E402

if __name__ == "__main__":
    main_process(APPLICATION / "configs")
