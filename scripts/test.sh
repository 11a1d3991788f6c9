#!/usr/bin/env bash
# Install what tests need, then style, types and the whole suite. Extra arguments go to pytest.
#
#   bash scripts/test.sh                     everything
#   bash scripts/test.sh tests/images -x     only some tests (style and types still run)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
bash install.sh --lavis --extras demo,data,dev,train
. scripts/environment.sh  # there may be a .venv now

# One test drives the demo in a real browser.
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "[test] installing chromium and its driver"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium \
            chromium-driver; } >/dev/null 2>&1 || echo "[test] chromium could not be installed: the browser test will fail"
    else
        echo "[test] no chromium and chromedriver here: the browser test will fail"
    fi
fi

export HF_HUB_OFFLINE=1 GRADIO_ANALYTICS_ENABLED=False TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
# Two cores are the reference machine; more threads make tiny models slower, not faster.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "[test] ruff";  "$PYTHON" -m ruff check .
echo "[test] mypy";  "$PYTHON" -m mypy
echo "[test] pytest"
exec "$PYTHON" -m pytest -q --durations=15 "$@"
