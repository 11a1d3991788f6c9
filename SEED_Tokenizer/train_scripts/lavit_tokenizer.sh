#!/bin/sh
# LaVIT's stage 1: the dynamic tokenizer and its decoder, from images alone.
#
#   sh train_scripts/lavit_tokenizer.sh                              this machine: all its GPUs, or one CPU process
#   sh train_scripts/lavit_tokenizer.sh NODE_RANK MASTER_ADDR        one of NNODES machines
#   sh train_scripts/lavit_tokenizer.sh --options run.max_epoch=1    with keys of the YAML changed
#   CONFIG=lavis/projects/nano/pretrain_lavit.yaml sh train_scripts/lavit_tokenizer.sh    a laptop, in minutes
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
launch 18273 --cfg-path "${CONFIG:-lavis/projects/lavit/train/pretrain_tokenizer.yaml}" "$@"
