#!/usr/bin/env bash
# The demo's model server on http://127.0.0.1:7890/generate. Extra arguments go to gradio_demo/seed_llama_flask.py.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
exec "$PYTHON" gradio_demo/seed_llama_flask.py \
    --image_transform configs/transform/clip_transform.yaml \
    --tokenizer configs/tokenizer/seed_llama_tokenizer.yaml \
    --model configs/llm/seed_llama_8b.yaml \
    --port 7890 --llm_device auto --tokenizer_device auto --offload_encoder --offload_decoder "$@"
