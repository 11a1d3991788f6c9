#!/bin/sh
# Train nano-lavit, a tiny LaVIT, on a finished nano, and report on it: --pico, --cpu or (default) one GPU; see --help. A stopped run resumes.
unset CDPATH
ROOT=$(cd "$(dirname "$0")/.." && pwd) && . "$ROOT/scripts/environment.sh"
PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m seed_nano.train nano-lavit --jobs 2 "$@"
