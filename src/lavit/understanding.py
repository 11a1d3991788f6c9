"""LaVIT describes images and answers questions about them.

python src/lavit/understanding.py --model nano-lavit         images/cat.jpg, three questions
python src/lavit/understanding.py --image dog.jpg --question "What is the dog doing?"
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.lavit_programs import lavit_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(lavit_script(Path(__file__).name, str(__doc__)))
