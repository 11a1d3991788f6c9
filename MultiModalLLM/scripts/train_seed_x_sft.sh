#!/bin/sh
# SEED-X's instruction tuning (comprehension and generation) with the published settings; run it on every node. Further arguments are flags or
# overrides that win:
#
#   sh scripts/train_seed_x_sft.sh --train_dataset my_data.yaml --max_steps 2000 --output_dir log/mine
#   NNODES=4 NODE_RANK=3 MASTER_ADDR=10.0.0.1 sh scripts/train_seed_x_sft.sh
set -eu
PROGRAM=src/train/train_seed_x_sft.py
unset CDPATH
cd "$(dirname "$0")/.."
. ../scripts/launch.sh
launch 20025 \
    --image_transform configs/processer/qwen_448_transform.yaml \
    --tokenizer configs/tokenizer/clm_llama_tokenizer_224loc_anyres.yaml \
    --visual_encoder configs/visual_encoder/qwen_vitg_448.yaml \
    --llm_model configs/clm_models/llm_seed_x_lora.yaml \
    --agent_model configs/clm_models/agent_seed_x.yaml \
    --train_dataset configs/data/sft_comprehension_gen.yaml \
    --deepspeed_plugin configs/accelerate/deepspeed_stage_3.yaml \
    --output_dir log/seed_x_sft_comp_gen --expr_name seed_x_sft_comp_gen \
    --learning_rate 1e-4 --min_lr_ratio 0.05 --warmup_steps 500 --lr_scheduler_type cosine \
    --weight_decay 0.05 --adam_beta1 0.9 --adam_beta2 0.98 --adam_epsilon 1e-6 --max_grad_norm 1.0 \
    --batch_size 50 --gradient_accumulation_steps 2 --mixed_precision bf16 \
    --num_train_epochs 10 --max_steps 20000 --save_steps 1000 --dataloader_num_workers 4 \
    "$@"
