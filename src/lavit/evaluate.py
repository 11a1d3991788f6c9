"""LaVIT's published evaluations: captions (COCO, NoCaps, Flickr30k), answers (VQAv2, OK-VQA, GQA,
VizWiz), FID.

    python src/lavit/evaluate.py --task_name caption --dataset nocaps \\
        --annopath nocaps_val.json --imagepath nocaps
    torchrun --nproc_per_node 8 src/lavit/evaluate.py --task_name vqa --dataset okvqa \\
        --annopath okvqa_val.json

Many processes share the work; the same command resumes where a run ended.
"""

import sys
from pathlib import Path

# Runs from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seed_multimodal.compat.lavit_evaluate import evaluate_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(evaluate_script(__doc__))
