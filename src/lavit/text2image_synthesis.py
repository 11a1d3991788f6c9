"""LaVIT draws texts, in six ratios.

python src/lavit/text2image_synthesis.py --model nano-lavit --prompt "a red apple"
python src/lavit/text2image_synthesis.py --ratio 3:2 --num_return_images 4
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.programs import run_original  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_original(__file__, __doc__))
