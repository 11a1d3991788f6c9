"""Train a small autoencoder from a large one; Hydra overrides, see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))
from seed_multimodal.compat.training_flags import main_process  # noqa: E402

if __name__ == "__main__":
    main_process(__file__)
