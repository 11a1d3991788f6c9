"""Pictures of captions, drawn as the original's probe does: after the bare caption, by 4 beams, guidance 5, steered
away from what the model draws without a caption.

    python3 eval/eval_caption_to_images.py --model nano --prompts chat          built-in captions
    python3 eval/eval_caption_to_images.py --captions captions_val2014.json --limit 30000 --out generated_images

Started by torchrun, many processes share the work; the same command resumes where a run ended.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))  # runs from a checkout that is not installed

from seed_multimodal.cli.evaluate import eval_program  # noqa: E402

if __name__ == "__main__":
    sys.exit(eval_program(Path(__file__).name, str(__doc__)))
