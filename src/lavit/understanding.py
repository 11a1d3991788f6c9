"""LaVIT describes images and answers questions about them.

python src/lavit/understanding.py --model nano-lavit         images/cat.jpg, three questions
python src/lavit/understanding.py --image dog.jpg --question "What is the dog doing?"
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.programs import run_original  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_original(__file__, __doc__))
