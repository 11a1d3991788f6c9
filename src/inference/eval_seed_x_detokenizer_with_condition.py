"""An image is drawn again from its features and a condition image, by the second stage.

python src/inference/eval_seed_x_detokenizer_with_condition.py                 the original weights
python src/inference/eval_seed_x_detokenizer_with_condition.py --model nano-x  the shipped ones
python src/inference/eval_seed_x_detokenizer_with_condition.py --image a.jpg --condition b.jpg
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.seed_x_programs import seed_x_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(seed_x_script("eval_seed_x_detokenizer_with_condition"))
