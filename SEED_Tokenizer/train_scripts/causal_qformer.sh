#!/bin/sh
# Stage 1, the causal Q-Former.
#
#   sh train_scripts/causal_qformer.sh                              this machine: all its GPUs, or one CPU process
#   sh train_scripts/causal_qformer.sh NODE_RANK MASTER_ADDR        one of NNODES machines
#   sh train_scripts/causal_qformer.sh --options run.max_epoch=1    with keys of the YAML changed
#   CONFIG=lavis/projects/nano/pretrain_qformer.yaml sh train_scripts/causal_qformer.sh    a laptop, in minutes
#
# Environment: CONFIG, NNODES, NPROC_PER_NODE, MASTER_PORT; NCCL's own variables (NCCL_SOCKET_IFNAME …) if you need them.
set -eu
cd "$(dirname "$0")/.."
ROOT=..
. ../scripts/environment.sh
exec "$PYTHON" launch.py --config "${CONFIG:-lavis/projects/blip2/train/pretrain_qformer.yaml}" --port 18273 "$@"
