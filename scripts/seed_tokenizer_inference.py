"""An image becomes 32 codes and an image again (images/cat.jpg → cat.jpg).

    python scripts/seed_tokenizer_inference.py                the original (pretrained/README.md)
    python scripts/seed_tokenizer_inference.py --model nano   the shipped one

The original's parts are what the YAML files in configs/ name: --tokenizer and --image_transform
take others.
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from seed_multimodal.compat.programs import run_original  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_original(__file__, __doc__))
