#!/bin/sh
# Image-text retrieval on COCO's 5,000 Karpathy test images, from the causal embeddings and from the codes.
#
#   MODEL=8b STAGE1=log/Causal_Qformer/checkpoint_0.pth IMAGES=/data/coco/images sh eval_scripts/retrieval_coco.sh
#
# MODEL: a tokenizer folder, or 8b (SEED-2's). STAGE1: the checkpoint with the text path (without it codes are compared with
# texts only through CLIP: --clip-text DIR). DATA: the json list {"image", "caption": [five]}. IMAGES: folder of its
# images. OUT: where report and evaluate.txt go. Paths are seen from SEED_Tokenizer. Further flags:
# seed eval tokenizer --help.
set -eu
unset CDPATH
cd "$(dirname "$0")/.."
ROOT=..
. ../scripts/environment.sh
export PYTHONPATH="../src${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m seed_multimodal eval tokenizer \
    --model "${MODEL:-8b}" --data "${DATA:-../data/coco/annotations/coco_karpathy_test.json}" \
    --image-root "${IMAGES:-../data/coco/images}" --rebuild 0 --out "${OUT:-log/eval/retrieval_coco}" \
    ${STAGE1:+--stage1 "$STAGE1"} "$@"
