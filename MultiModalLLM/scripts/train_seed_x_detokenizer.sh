#!/bin/sh
# SEED-X's de-tokenizer with the published settings (what is unpublished is said in configs/seed_x_detokenizer); run it on
# every node. The first argument is the stage, 1 or 2; further ones are overrides that win:
#
#   sh scripts/train_seed_x_detokenizer.sh 1 data=my_pictures.yaml output_dir=log/mine
#   sh scripts/train_seed_x_detokenizer.sh 2 data=my_edits.yaml model.start=log/mine/adapter output_dir=log/edits
#   NNODES=4 NODE_RANK=3 MASTER_ADDR=10.0.0.1 sh scripts/train_seed_x_detokenizer.sh 1
set -eu
stage=${1:-}
case $stage in
    1 | 2) shift ;;
    -h | --help) stage=1 ;;
    *)
        echo "$0: the first argument is the stage: 1 (draw from embeddings) or 2 (beside a condition picture)." >&2
        exit 2
        ;;
esac
PROGRAM=src/train/train_seed_x_detokenizer.py
unset CDPATH
cd "$(dirname "$0")/.."
. ../scripts/launch.sh
launch 20024 model="stage$stage" data="stage$stage" trainer="stage$stage" \
    output_dir="log/seed_x_detokenizer_stage$stage" "$@"
