"""SEED-X-Edit changes an image (vis/1_Make it under the sunset.jpg).

python src/inference/eval_img2edit_seed_x_edit.py                 the original weights
python src/inference/eval_img2edit_seed_x_edit.py --model nano-x  the shipped ones
python src/inference/eval_img2edit_seed_x_edit.py --image a.jpg --prompt "Make it snow."
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.programs import run_original  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_original(__file__, __doc__))
