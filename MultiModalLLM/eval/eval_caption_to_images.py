"""Draw images of captions, by the original's settings.

The same command resumes (also under torchrun).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from seed_multimodal.cli.evaluate import eval_program  # noqa: E402

if __name__ == "__main__":
    sys.exit(eval_program(Path(__file__).name, str(__doc__)))
