#!/usr/bin/env bash
# The main job, from nothing: install if needed, then look at scenes, name their 32 codes, rebuild and describe them, draw,
# edit, talk and tell a story with the shipped pretrained/nano weights. Result: outputs/quickstart/contact_sheet.png
#
#   bash scripts/quickstart.sh [--model DIR] [--out DIR] [--seed N]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
bash install.sh
. scripts/environment.sh  # there may be a .venv now
HF_HUB_OFFLINE=1 exec "$PYTHON" -m seed_multimodal.quickstart "$@"
