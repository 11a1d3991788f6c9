"""Conversations with images (LLaVA's json and others) → tars of `{messages}`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))
from seed_multimodal.cli.data import extraction_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(extraction_script("chat", Path(__file__).name, str(__doc__)))
