"""Base model + trained adapter → a plain LLaMA folder (weights, configuration, tokenizer), checked by its logits.

    python3 src/tools/merge_lora_weights.py \\
        --model_cfg configs/model/vicuna_7b_lora_pretrained.yaml \\
        --tokenizer_cfg configs/tokenizer/seed_llama_tokenizer.yaml \\
        --base_model pretrained/vicuna-7b-v1.1 \\
        --lora_model log/seed_vicuna-7b_lora_pretrain/checkpoint-10000 \\
        --save_path log/seed_vicuna-7b_lora_pretrain/checkpoint-merged-10000

    python3 src/tools/merge_lora_weights.py \\
        --model_cfg configs/clm_models/llm_seed_x_lora.yaml \\
        --tokenizer_cfg configs/tokenizer/clm_llama_tokenizer_224loc_anyres.yaml \\
        --lora_model log/seed_x_sft_comp_gen/checkpoint-20000 \\
        --save_path log/seed_x_sft_comp_gen/merged

The second one gives a folder with `llm` and `agent` for `SeedX.from_pretrained`; it takes what DeepSpeed's
`zero_to_fp32.py` writes, too. After instruction tuning of SEED-LLaMA, `--base_model` is the folder that the first merge
wrote. Memory holds one model in fp32.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "src"))  # runs from a checkout that is not installed

from seed_multimodal.cli.tools import merge_script  # noqa: E402

if __name__ == "__main__":
    sys.exit(merge_script(Path(__file__).name, str(__doc__)))
