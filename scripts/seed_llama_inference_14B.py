"""SEED-LLaMA 14B: a question about images/cat.jpg, a drawing (dog.jpg), an edit
(cat_sunglasses.jpg).

    python scripts/seed_llama_inference_14B.py                       the original weights
    python scripts/seed_llama_inference_14B.py --model nano          the shipped ones
    python scripts/seed_llama_inference_14B.py --image a.jpg --prompt "What is this?"

The original's parts are what the YAML files in configs/ name: --tokenizer, --image_transform and
--llm take others.
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from seed_multimodal.compat.programs import run_original  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_original(__file__, __doc__))
