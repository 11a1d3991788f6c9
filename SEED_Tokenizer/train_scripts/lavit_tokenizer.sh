#!/bin/sh
# LaVIT's stage 1: the dynamic tokenizer and its decoder, from pictures alone.
#
#   sh train_scripts/lavit_tokenizer.sh                              this machine: all its GPUs, or one CPU process
#   sh train_scripts/lavit_tokenizer.sh NODE_RANK MASTER_ADDR        one of NNODES machines
#   sh train_scripts/lavit_tokenizer.sh --options run.max_epoch=1    with keys of the YAML changed
#   CONFIG=lavis/projects/nano/pretrain_lavit.yaml sh train_scripts/lavit_tokenizer.sh    a laptop, in minutes
#
# Environment: CONFIG, NNODES, NPROC_PER_NODE, MASTER_PORT; NCCL's own variables (NCCL_SOCKET_IFNAME …) if you need them.
set -eu
cd "$(dirname "$0")/.."
ROOT=..
. ../scripts/environment.sh
exec "$PYTHON" launch.py --config "${CONFIG:-lavis/projects/lavit/train/pretrain_tokenizer.yaml}" --port 18273 "$@"
