#!/bin/sh
# Stage 1, the causal Q-Former.
#
#   sh train_scripts/causal_qformer.sh                              this machine: all its GPUs, or one CPU process
#   sh train_scripts/causal_qformer.sh NODE_RANK MASTER_ADDR        one of NNODES machines
#   sh train_scripts/causal_qformer.sh --options run.max_epoch=1    with keys of the YAML changed
#   CONFIG=lavis/projects/nano/pretrain_qformer.yaml sh train_scripts/causal_qformer.sh    a laptop, in minutes
#
# Environment: CONFIG, and that of scripts/launch.sh (NNODES, NPROC_PER_NODE, MASTER_PORT, …).
set -eu
unset CDPATH
cd "$(dirname "$0")/.."
. ../scripts/launch.sh
case ${1:-} in
    [0-9]*) NODE_RANK=$1 MASTER_ADDR=$2 && shift 2 ;;
esac
PROGRAM=train.py
launch 18273 --cfg-path "${CONFIG:-lavis/projects/blip2/train/pretrain_qformer.yaml}" "$@"
