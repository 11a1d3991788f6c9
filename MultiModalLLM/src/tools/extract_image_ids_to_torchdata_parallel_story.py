"""Stories → tars of `{image_ids, caption0, …, caption4}`, codes picture after picture.

    python3 src/tools/extract_image_ids_to_torchdata_parallel_story.py \\
        --tokenizer configs/tokenizer/seed_llama_tokenizer.yaml \\
        --data configs/data/story_preprocess.yaml --save_dir data/tokenizer_data/VIST

Started by torchrun, or with `--shard I/N` in a job array, many machines share the work; the same command resumes where
a run ended.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))  # runs from a checkout that is not installed

from seed_multimodal.cli.data import extraction_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(extraction_script("story", Path(__file__).name, str(__doc__)))
