"""Pictures with captions → tars of `{image_ids, text, metadata}`.

    python3 src/tools/extract_image_ids_to_torchdata_parallel.py \\
        --tokenizer configs/tokenizer/seed_llama_tokenizer.yaml \\
        --image_transform configs/processer/blip_transform.yaml --data configs/data/caption_torchdata_preprocess.yaml \\
        --save_dir dataset/seed_llama/caption/unsplash_cc3m/ --batch_size 1024 --num_workers 8 --gpus 8

Started by torchrun, or with `--shard I/N` in a job array, many machines share the work; the same command resumes where
a run ended.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))  # runs from a checkout that is not installed

from seed_multimodal.cli.data import extraction_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(extraction_script("caption", Path(__file__).name, str(__doc__)))
