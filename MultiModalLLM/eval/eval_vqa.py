"""Questions about pictures: one, as the original asked, or a whole set in VQA's own files, with its accuracy.

    python3 eval/eval_vqa.py --model nano                                       the probe: a question about one picture
    python3 eval/eval_vqa.py --questions v2_OpenEnded_mscoco_val2014_questions.json \\
        --annotations v2_mscoco_val2014_annotations.json --images coco/val2014 --out outputs/vqav2

Started by torchrun, many processes share the work; the same command resumes where a run ended.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))  # runs from a checkout that is not installed

from seed_multimodal.cli.evaluate import eval_program  # noqa: E402

if __name__ == "__main__":
    sys.exit(eval_program(Path(__file__).name, str(__doc__)))
