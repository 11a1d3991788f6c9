#!/usr/bin/env bash
# Install what tests need, then style, types and the suite, on all cores. Extra arguments go to pytest.
#
#   bash scripts/test.sh                      the suite: what CI runs for each change
#   bash scripts/test.sh --fast               without tests that start processes, drive a browser or take seconds
#   bash scripts/test.sh --nightly            everything: also all trainers, browsers, installation, faults, benchmarks
#   bash scripts/test.sh tests/unit/images -x only some tests (style and types still run; of tests/nightly: --nightly)
#
# WORKERS=N: pytest processes (default: one a core, each with 6 GiB of memory that is free now).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
MARKERS="not nightly"
case "${1:-}" in
    --fast) MARKERS="not process and not browser and not slow and not nightly"; shift ;;
    --nightly) MARKERS=""; shift ;;
    -h|--help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit ;;
esac
bash install.sh --lavis --extras demo,dev,docs,eval,train
ROOT=$PWD
. scripts/environment.sh

# Some tests drive the demo in a real browser, one of them behind nginx.
if [ "${MARKERS#*not browser}" = "$MARKERS" ] &&
    { ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null || ! command -v nginx >/dev/null; }; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "[test] installing chromium, its driver and nginx"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium \
            chromium-driver nginx-light; } >/dev/null 2>&1 || echo "[test] chromium or nginx could not be installed"
    else
        echo "[test] chromium, chromedriver or nginx is missing here: without chromium the browser tests will fail"
    fi
fi

export HF_HUB_OFFLINE=1 GRADIO_ANALYTICS_ENABLED=False TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE  # processes of tests would compile the package again and again
# A worker has one core; more threads make tiny models slower, not faster.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
WORKERS="${WORKERS:-$("$PYTHON" -c '
import os, pathlib
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
memory = pathlib.Path("/proc/meminfo")
free = int(memory.read_text().split("MemAvailable:")[1].split()[0]) >> 20 if memory.is_file() else 6 * cores  # GiB
print(max(1, min(cores, free // 6)))')}"

echo "[test] ruff";  "$PYTHON" -m ruff check .; "$PYTHON" -m ruff format --check .
echo "[test] mypy";  "$PYTHON" -m mypy
echo "[test] pytest, $WORKERS at once"
exec "$PYTHON" -m pytest -q -n "$WORKERS" --dist loadfile --no-loadscope-reorder -m "$MARKERS" "$@"
