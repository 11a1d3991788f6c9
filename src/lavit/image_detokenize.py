"""LaVIT draws images again from their codes, and a sheet with both next to each other.

python src/lavit/image_detokenize.py --model nano-lavit --image images/*.png
python src/lavit/image_detokenize.py --guidance_scale 2 --steps 25
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.programs import run_original  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_original(__file__, __doc__))
