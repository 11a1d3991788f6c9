"""LaVIT's tasks one after the other: a caption, an answer, an image of a text, an image of an image and words.

python src/lavit/inference.py --model nano-lavit
python src/lavit/inference.py --image dog.jpg --question "What is the dog doing?" --words "It is in the snow."
"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # runs from a checkout that is not installed

from seed_multimodal.cli.lavit import lavit_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(lavit_script(Path(__file__).name, str(__doc__)))
