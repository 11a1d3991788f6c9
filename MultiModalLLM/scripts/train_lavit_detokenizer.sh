#!/bin/sh
# LaVIT's pixel decoder from an image's own codes (what is unpublished is said in configs/lavit_detokenizer); run it on
# every node. The first argument is the decoder, highres or lowres; further ones are overrides that win:
#
#   sh scripts/train_lavit_detokenizer.sh highres data=my_pictures.yaml output_dir=log/mine
#   NNODES=4 NODE_RANK=3 MASTER_ADDR=10.0.0.1 sh scripts/train_lavit_detokenizer.sh lowres
set -eu
kind=${1:-}
case $kind in
    highres) shift; set -- deepspeed=stage2_bf16 "$@" ;;
    lowres) shift ;;
    -h | --help) kind=highres ;;
    *)
        echo "$0: the first argument is the decoder: highres (SDXL's kind) or lowres (Stable Diffusion 1.5's)." >&2
        exit 2
        ;;
esac
PROGRAM=src/train/train_lavit_detokenizer.py
unset CDPATH
cd "$(dirname "$0")/.."
. ../scripts/launch.sh
launch 20025 model="$kind" data="$kind" trainer="$kind" output_dir="log/lavit_$kind" "$@"
