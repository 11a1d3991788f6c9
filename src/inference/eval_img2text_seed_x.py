"""SEED-X describes an image, and finds a car in another (vis/car.png).

python src/inference/eval_img2text_seed_x.py                 the original weights
python src/inference/eval_img2text_seed_x.py --model nano-x  the shipped ones
python src/inference/eval_img2text_seed_x.py --image a.jpg --detect "there is a dog"
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.seed_x_programs import seed_x_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(seed_x_script("eval_img2text_seed_x"))
