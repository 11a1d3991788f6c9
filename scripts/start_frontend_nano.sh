#!/usr/bin/env bash
# The demo's web page on http://127.0.0.1:7860; start the backend first. Extra arguments go to seed_llama_gradio.py.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
export GRADIO_ANALYTICS_ENABLED=False
exec "$PYTHON" gradio_demo/seed_llama_gradio.py --model_type nano --server_port 7860 \
    --request_address http://127.0.0.1:7890/generate "$@"
