#!/usr/bin/env bash
# The main job, from nothing: install if needed, then look at scenes, name their 32 codes, rebuild and describe them, draw,
# edit, talk and tell a story with the shipped pretrained/nano weights. Result: outputs/quickstart/contact_sheet.png
#
#   bash scripts/quickstart.sh [--model DIR] [--out DIR] [--seed N]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ " $* " == *" -h "* || " $* " == *" --help "* ]] || bash install.sh
ROOT=$PWD
. scripts/environment.sh
HF_HUB_OFFLINE=1 exec "$PYTHON" -m seed_nano.quickstart "$@"
