"""SEED-X draws a caption.

python src/inference/eval_text2img_seed_x.py                 the original weights
python src/inference/eval_text2img_seed_x.py --model nano-x  the shipped ones
python src/inference/eval_text2img_seed_x.py --prompt "A red fox in the snow." --seed 1 --steps 30
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.programs import run_original  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_original(__file__, __doc__))
