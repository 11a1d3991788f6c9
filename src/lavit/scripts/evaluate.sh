#!/bin/sh
# LaVIT's evaluations on this machine's GPUs, one process each (NPROC=N for another number); the flags are evaluate.py's,
# and paths count from the current folder.
set -eu
unset CDPATH
HERE="$(cd "$(dirname "$0")/.." && pwd)"
ROOT="$(cd "$HERE/../.." && pwd)"
. "$ROOT/scripts/environment.sh"
export PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}"  # a checkout need not be installed
COUNT="${NPROC:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
if [ "$COUNT" = 1 ]; then
    exec "$PYTHON" "$HERE/evaluate.py" "$@"
fi
exec "$PYTHON" -m seed_multimodal.training.torchrun --nnodes=1 --node_rank=0 --nproc_per_node="$COUNT" \
    --master_addr=127.0.0.1 --master_port="${MASTER_PORT:-29523}" "$HERE/evaluate.py" "$@"
