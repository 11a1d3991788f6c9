"""LaVIT's tasks one after the other: a caption, an answer, an image of a text, an image of an image
and words.

python src/lavit/inference.py --model nano-lavit
python src/lavit/inference.py --image dog.jpg --question "Where is it?" --words "It is in the snow."
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.programs import run_original  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_original(__file__, __doc__))
