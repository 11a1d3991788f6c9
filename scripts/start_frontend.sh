#!/usr/bin/env bash
# The demo's web page on http://127.0.0.1:7860: start_frontend.sh MODEL [more arguments], where
# MODEL is one of those that gradio_demo/seed_llama_gradio.py --help lists (nano, seed-llama-8b).
# Start the backend first. More arguments go to gradio_demo/seed_llama_gradio.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
. scripts/environment.sh
export GRADIO_ANALYTICS_ENABLED=False
kind="${1:?say which model: nano, seed-llama-8b or another --model_type of gradio_demo/seed_llama_gradio.py}"
shift
case "$kind" in 8b|14b) kind=seed-llama-$kind ;; esac  # as the backend names them
exec "$PYTHON" gradio_demo/seed_llama_gradio.py --model_type "$kind" --server_port 7860 \
    --request_address http://127.0.0.1:7890/generate "$@"
