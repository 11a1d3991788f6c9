#!/usr/bin/env bash
# The demo's model server on http://127.0.0.1:7890/generate. Extra arguments go to gradio_demo/seed_llama_flask.py.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
exec "$PYTHON" gradio_demo/seed_llama_flask.py --system nano --port 7890 "$@"
