"""Captions of pictures, with BLEU, ROUGE-L and CIDEr: the training's caption evaluation as a command.

    python3 eval/eval_caption.py --captions coco_karpathy_test.json --images coco --out outputs/coco
    python3 eval/eval_caption.py --captions dataset_coco.json --split test --images coco --prompts plain

Started by torchrun, many processes share the work; the same command resumes where a run ended.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))  # runs from a checkout that is not installed

from seed_multimodal.cli.evaluate import eval_program  # noqa: E402

if __name__ == "__main__":
    sys.exit(eval_program(Path(__file__).name, str(__doc__)))
