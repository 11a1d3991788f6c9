"""Base model + trained adapter → a plain LLaMA folder (weights, configuration, tokenizer), checked
by its logits."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))
from seed_multimodal.compat.weight_programs import merge_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(merge_script(Path(__file__).name, str(__doc__)))
