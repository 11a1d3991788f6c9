"""Editing pairs → tars of `{source_image_ids, target_image_ids, instruction}`.

    python3 src/tools/extract_image_ids_to_torchdata_parallel_edit.py \\
        --tokenizer configs/tokenizer/seed_llama_tokenizer.yaml \\
        --data configs/data/edit_preprocess.yaml --save_dir data/tokenizer_data/instruct-pix2pix

`--fields source=KEY,target=KEY,instruction=KEY,instruction_gpt=KEY,response=KEY` where the json names them otherwise.

Started by torchrun, or with `--shard I/N` in a job array, many machines share the work; the same command resumes where
a run ended.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))  # runs from a checkout that is not installed

from seed_multimodal.cli.data import extraction_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(extraction_script("edit", Path(__file__).name, str(__doc__)))
