"""An image is drawn again from its features and a condition image, by the second stage.

python src/inference/eval_seed_x_detokenizer_with_condition.py                 the original weights
python src/inference/eval_seed_x_detokenizer_with_condition.py --model nano-x  the shipped ones
python src/inference/eval_seed_x_detokenizer_with_condition.py --image a.jpg --condition b.jpg
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.programs import run_original  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_original(__file__, __doc__))
