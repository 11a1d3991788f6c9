#!/bin/sh
# Pretraining with the published settings; run it on every node. Further arguments are flags or overrides that win:
#
#   sh scripts/train_a100_lora_multi_node_pretrain.sh --max_steps 10000 --output_dir log/mine
#   NNODES=8 NODE_RANK=3 MASTER_ADDR=10.0.0.1 sh scripts/train_a100_lora_multi_node_pretrain.sh
#   NPROC=1 sh scripts/train_a100_lora_multi_node_pretrain.sh model=nano_lora tokenizer=nano data=my_data.yaml \
#       deepspeed=none trainer=nano optim=nano output_dir=log/nano                     a laptop's CPU, in minutes
set -eu
unset CDPATH
cd "$(dirname "$0")/.."
. ../scripts/launch.sh
launch 20002 \
    --model configs/model/vicuna_7b_lora.yaml \
    --tokenizer configs/tokenizer/seed_llama_tokenizer.yaml \
    --train_data configs/data/multi_torchdata_pretrain.yaml \
    --deepspeed configs/deepspeed/stage2_bf16.json \
    --output_dir log/seed_vicuna-7b_lora_pretrain \
    --max_steps 30000 --save_steps 1000 \
    --learning_rate 1.5e-4 --min_lr_ratio 0.05 --warmup_ratio 0.03 --lr_scheduler_type cosine \
    --weight_decay 0.05 --adam_beta1 0.9 --adam_beta2 0.95 --adam_epsilon 1e-5 --max_grad_norm 1.0 \
    --gradient_accumulation_steps 4 --per_device_train_batch_size 128 --per_device_eval_batch_size 1 \
    --bf16 True --gradient_checkpointing True --dataloader_num_workers 2 \
    --logging_steps 1 --report_to tensorboard --evaluation_strategy no \
    --ignore_data_skip True --logging_nan_inf_filter no --log_level info \
    "$@"
