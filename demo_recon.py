"""SEED-1: an image becomes 32 codes, and the codes become images by Stable Diffusion
(docs/how-to/seed-1.md).

python demo_recon.py                                   images/cat.jpg, weights in pretrained/
python demo_recon.py --image a.png b.jpg --device cpu --out outputs/recon
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from seed_multimodal.compat.demo_recon import recon_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(recon_script(__doc__))
