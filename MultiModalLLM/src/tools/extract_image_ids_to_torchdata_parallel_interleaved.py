"""Documents of pictures and texts in turn → tars of `{image_ids, texts, metadata}`.

    python3 src/tools/extract_image_ids_to_torchdata_parallel_interleaved.py \\
        --tokenizer configs/tokenizer/seed_llama_tokenizer.yaml \\
        --data configs/data/interleaved_preprocess.yaml --save_dir dataset/image_interleaved/mmc4

Records with `instruction` and `response` (`<image>` where a picture stands) become such, with the pictures' words.

Started by torchrun, or with `--shard I/N` in a job array, many machines share the work; the same command resumes where
a run ended.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))  # runs from a checkout that is not installed

from seed_multimodal.cli.data import extraction_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(extraction_script("interleaved", Path(__file__).name, str(__doc__)))
