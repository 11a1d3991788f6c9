#!/usr/bin/env bash
# Build the sdist and the wheel into dist/, install the wheel into an empty environment, and run it there.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT

rm -rf dist
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install -q --no-compile build
"$WORK/venv/bin/python" -m build -q --outdir dist .

# Outside the checkout, so that only the wheel is found.
cd "$WORK"
"$WORK/venv/bin/pip" install -q --no-compile "$ROOT"/dist/*.whl
"$WORK/venv/bin/seed" --help > /dev/null
"$WORK/venv/bin/seed" describe "$ROOT/images/fox.png" --model "$ROOT/pretrained/nano"
ls -l "$ROOT/dist"
