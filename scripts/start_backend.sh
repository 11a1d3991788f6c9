#!/usr/bin/env bash
# The demo's model server on http://127.0.0.1:7890/generate for one model:
#     start_backend.sh MODEL [more arguments]
# MODEL is a name (nano, 8b; `seed describe --help` lists all) or a folder with a system.json; its path is absolute, or from
# the repository. More arguments go to gradio_demo/seed_llama_flask.py.
# 8b and 14b load in 8 bits, as the original's demo, but by torchao: answers then do not depend on what else is answered at
# the same time. --quantization 8bit: by bitsandbytes, as the original.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
. scripts/environment.sh
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
size="${1:?say which model: nano, 8b or another name of seed describe --help, or a folder with system.json}"
shift
if [ ! -f "configs/llm/seed_llama_${size}_8bit.yaml" ]; then
    exec "$PYTHON" gradio_demo/seed_llama_flask.py --system "$size" --port 7890 "$@"
fi
exec "$PYTHON" gradio_demo/seed_llama_flask.py \
    --image_transform configs/transform/clip_transform.yaml \
    --tokenizer configs/tokenizer/seed_llama_tokenizer_hf.yaml \
    --model "configs/llm/seed_llama_${size}_8bit.yaml" \
    --quantization int8 --port 7890 --llm_device auto --tokenizer_device auto --offload_encoder --offload_decoder "$@"
