#!/usr/bin/env bash
# One page about a GPU: bash benchmarks/gpu_card.sh OUT [flags of gpu_card.py].
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
unset CDPATH
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$ROOT/scripts/environment.sh"
exec "$PYTHON" "$ROOT/benchmarks/gpu_card.py" "$@"
