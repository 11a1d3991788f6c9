#!/bin/sh
# Stage 2, codebook and decode head (from a checkpoint of stage 1).
#
#   sh train_scripts/codebook.sh                              this machine: all its GPUs, or one CPU process
#   sh train_scripts/codebook.sh NODE_RANK MASTER_ADDR        one of NNODES machines
#   sh train_scripts/codebook.sh --options run.max_epoch=1    with keys of the YAML changed
#   CONFIG=lavis/projects/nano/pretrain_codebook.yaml sh train_scripts/codebook.sh    a laptop, in minutes
#
# Environment: CONFIG, NNODES, NPROC_PER_NODE, MASTER_PORT; NCCL's own variables (NCCL_SOCKET_IFNAME …) if you need them.
set -eu
cd "$(dirname "$0")/.."
ROOT=..
. ../scripts/environment.sh
exec "$PYTHON" launch.py --config "${CONFIG:-lavis/projects/blip2/train/pretrain_codebook.yaml}" --port 18272 "$@"
