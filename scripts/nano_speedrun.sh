#!/bin/sh
# Train every part of nano from scratch, and report on it: --pico, --cpu or (default) one GPU; see --help. A stopped run resumes.
unset CDPATH
ROOT=$(cd "$(dirname "$0")/.." && pwd) && . "$ROOT/scripts/environment.sh"
PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" -m seed_nano.train nano --jobs 2 "$@"
