#!/bin/sh
# A decoder of SEED's codes from images alone, SDXL's U-Net unless model=sana data=sana; run it on every node. Further
# arguments are overrides:
#
#   sh scripts/train_seed_decoder.sh data=my_images.yaml output_dir=log/mine
#   NNODES=4 NODE_RANK=3 MASTER_ADDR=10.0.0.1 sh scripts/train_seed_decoder.sh
set -eu
PROGRAM=src/train/train_seed_decoder.py
unset CDPATH
cd "$(dirname "$0")/.."
. ../scripts/launch.sh
launch 20028 output_dir=log/seed_decoder "$@"
