"""SEED-X describes an image, and finds a car in another (vis/car.png).

python src/inference/eval_img2text_seed_x.py                 the original weights
python src/inference/eval_img2text_seed_x.py --model nano-x  the shipped ones
python src/inference/eval_img2text_seed_x.py --image a.jpg --detect "there is a dog"
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.programs import run_original  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_original(__file__, __doc__))
