#!/usr/bin/env bash
# The demo's web page on http://127.0.0.1:7860: start_frontend.sh MODEL [more arguments], where
# MODEL is nano, seed-llama-8b, seed-llama-14b, seed-x, seed-x-i, seed-x-edit, nano-x, lavit or nano-lavit.
# Start the backend first. More arguments go to gradio_demo/seed_llama_gradio.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
. scripts/environment.sh
export GRADIO_ANALYTICS_ENABLED=False
kind="${1:?say which model: nano, seed-llama-8b, seed-llama-14b, seed-x, seed-x-i, seed-x-edit, nano-x, lavit or nano-lavit}"
shift
exec "$PYTHON" gradio_demo/seed_llama_gradio.py --model_type "$kind" --server_port 7860 \
    --request_address http://127.0.0.1:7890/generate "$@"
