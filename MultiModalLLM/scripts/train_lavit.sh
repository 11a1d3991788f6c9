#!/bin/sh
# LaVIT's unified pre-training (stage 2) on 8 x A100; run it on every node. Further arguments are overrides that win:
#
#   sh scripts/train_lavit.sh data=my_data.yaml trainer.max_steps=2000 output_dir=log/mine
#   sh scripts/train_lavit.sh deepspeed=configs/deepspeed/stage3_offload_bf16.json        GPUs of 40 GB
#   NNODES=4 NODE_RANK=3 MASTER_ADDR=10.0.0.1 sh scripts/train_lavit.sh
set -eu
PROGRAM=src/train/train_lavit.py
unset CDPATH
cd "$(dirname "$0")/.."
. ../scripts/launch.sh
launch 20031 output_dir=log/lavit_pretrain deepspeed=configs/deepspeed/stage2_bf16.json "$@"
