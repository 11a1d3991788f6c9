#!/bin/sh
# How well codes bring images back: CLIP similarity of the decoded embedding and of rebuilt images, codebook use,
# a contact sheet. One image only: python eval/seed_inference.py.
#
#   MODEL=8b DATA=/data/coco/annotations/coco_karpathy_test.json IMAGES=/data/coco/images \
#       sh eval_scripts/reconstruction.sh --limit 1000
#
# DATA: a json list, a pattern of .tar shards, or nano. The other variables are those of retrieval_coco.sh.
set -eu
unset CDPATH
cd "$(dirname "$0")/.."
ROOT=..
. ../scripts/environment.sh
export PYTHONPATH="../src${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m seed_multimodal eval tokenizer \
    --model "${MODEL:-8b}" --data "${DATA:-../data/coco/annotations/coco_karpathy_test.json}" \
    ${IMAGES:+--image-root "$IMAGES"} --out "${OUT:-log/eval/reconstruction}" "$@"
