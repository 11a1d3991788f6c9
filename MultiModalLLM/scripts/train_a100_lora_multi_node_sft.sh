#!/bin/sh
# Instruction tuning with the published settings, from the merged pretrained model; run it on every node. Further
# arguments are flags or overrides that win:
#
#   sh scripts/train_a100_lora_multi_node_sft.sh --max_steps 10000 --output_dir log/mine
#   NNODES=4 NODE_RANK=3 MASTER_ADDR=10.0.0.1 sh scripts/train_a100_lora_multi_node_sft.sh
set -eu
unset CDPATH
cd "$(dirname "$0")/.."
. ../scripts/launch.sh
launch 20023 \
    --model configs/model/vicuna_7b_lora_from_merged_pretrain.yaml \
    --tokenizer configs/tokenizer/seed_llama_tokenizer.yaml \
    --train_data configs/data/multi_torchdata_sft.yaml \
    --deepspeed configs/deepspeed/stage2_offload_bf16.json \
    --output_dir log/seed_vicuna-7b_lora_sft \
    --max_steps 50000 --save_steps 10000 \
    --learning_rate 1e-4 --min_lr_ratio 0.1 --warmup_ratio 0.07 --lr_scheduler_type cosine \
    --weight_decay 0.05 --adam_beta1 0.9 --adam_beta2 0.95 --adam_epsilon 1e-5 --max_grad_norm 1.0 \
    --gradient_accumulation_steps 1 --per_device_train_batch_size 128 --per_device_eval_batch_size 1 \
    --bf16 True --gradient_checkpointing True --dataloader_num_workers 2 \
    --logging_steps 1 --report_to tensorboard --evaluation_strategy no \
    --ignore_data_skip True --logging_nan_inf_filter no --log_level info \
    "$@"
