#!/bin/sh
# Image-text retrieval on Flickr30k's 1,000 test pictures, from the causal embeddings and from the codes.
#
#   MODEL=released STAGE1=log/Causal_Qformer/checkpoint_0.pth IMAGES=/data/flickr30k sh eval_scripts/retrieval_flickr.sh
#
# The variables are those of retrieval_coco.sh.
set -eu
cd "$(dirname "$0")/.."
. train_scripts/python.sh
export PYTHONPATH="../src${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m seed_multimodal.cli eval tokenizer \
    --model "${MODEL:-released}" --data "${DATA:-../data/flickr30k/annotations/flickr30k_test.json}" \
    --image-root "${IMAGES:-../data/flickr30k/images}" --rebuild 0 --out "${OUT:-log/eval/retrieval_flickr}" \
    ${STAGE1:+--stage1 "$STAGE1"} "$@"
