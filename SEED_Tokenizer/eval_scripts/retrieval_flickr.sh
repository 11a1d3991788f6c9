#!/bin/sh
# Image-text retrieval on Flickr30k's 1,000 test images, from the causal embeddings and from the codes.
#
#   MODEL=8b STAGE1=log/Causal_Qformer/checkpoint_0.pth IMAGES=/data/flickr30k sh eval_scripts/retrieval_flickr.sh
#
# The variables are those of retrieval_coco.sh, which does the work.
set -eu
DATA="${DATA:-../data/flickr30k/annotations/flickr30k_test.json}"
IMAGES="${IMAGES:-../data/flickr30k/images}"
OUT="${OUT:-log/eval/retrieval_flickr}"
export DATA IMAGES OUT
exec sh "$(dirname "$0")/retrieval_coco.sh" "$@"
