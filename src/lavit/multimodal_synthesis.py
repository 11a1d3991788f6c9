"""LaVIT draws what images and words say together, in the order in which they are given.

python src/lavit/multimodal_synthesis.py --model nano-lavit
python src/lavit/multimodal_synthesis.py dog.jpg "It is running in the snow." --ratio 4:3
python src/lavit/multimodal_synthesis.py dog.jpg hat.jpg
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.programs import run_original  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_original(__file__, __doc__))
