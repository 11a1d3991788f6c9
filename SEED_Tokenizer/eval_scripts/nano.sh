#!/bin/sh
# Everything that is measured of a tokenizer, on the shipped one and held-out scenes of nano's data: no downloads.
#
#   sh eval_scripts/nano.sh
#   MODEL=../outputs/tokenizer STAGE1=log/nano/Causal_Qformer/checkpoint_2.pth sh eval_scripts/nano.sh \
#       --text-tokenizer ../pretrained/nano/seed_tokenizer --decoder ../pretrained/nano/seed_tokenizer/diffusion_model
#
# SPLIT: val (default), pairs, places, counts, styles or things. The other variables are those of retrieval_coco.sh.
set -eu
unset CDPATH
cd "$(dirname "$0")/.."
ROOT=..
. ../scripts/environment.sh
export PYTHONPATH="../src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
exec "$PYTHON" -m seed_multimodal eval tokenizer --model "${MODEL:-nano}" --data "${DATA:-nano}" --split "${SPLIT:-val}" \
    --out "${OUT:-log/eval/nano}" ${STAGE1:+--stage1 "$STAGE1"} "$@"
