"""Questions about pictures → tars of `{image_ids, question, answer}`.

    python3 src/tools/extract_image_ids_to_torchdata_parallel_qa.py \\
        --tokenizer configs/tokenizer/seed_llama_tokenizer.yaml \\
        --image_transform configs/processer/blip_transform.yaml \\
        --data configs/data/question_answer_torchdata_eval.yaml \\
        --save_dir data/VQAv2 --batch_size 512 --num_workers 8 --gpus 8 --fields vqa

`--fields`: journeydb (default, as released: a caption answers the request for a description), describe, vqa (questions
get the suffix that asks for one word), plain; or NAME=KEY pairs of image, question, answer, ask, suffix.

Started by torchrun, or with `--shard I/N` in a job array, many machines share the work; the same command resumes where
a run ended.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))  # runs from a checkout that is not installed

from seed_multimodal.cli.data import extraction_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(extraction_script("qa", Path(__file__).name, str(__doc__)))
