#!/usr/bin/env bash
# Install SEED Multimodal into the active environment (venv or conda), or into .venv (created here) when none is active.
#
#   bash install.sh                          core: everything inference needs
#   bash install.sh --extras demo,eval,dev   with extras of pyproject.toml (train, demo, eval, lavit, laptop, ray, docs, dev)
#   bash install.sh --lavis                  with salesforce-lavis (without its 2023 pins) for SEED_Tokenizer/
#
# An installed torch is kept. Otherwise, without an NVIDIA GPU, PyTorch's CPU builds are installed (0.2 GB); where
# PyTorch's index cannot be reached, and with a GPU, torch comes from the package index (on Linux about 3 GB).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"

EXTRAS="" LAVIS=""
while [ $# -gt 0 ]; do
    case "$1" in
        --extras) EXTRAS="$EXTRAS,${2:?--extras needs a list, for example demo,dev}"; shift 2 ;;
        --lavis) LAVIS=1; shift ;;
        -h|--help) sed -n '2,9s/^# \{0,1\}//p' install.sh; exit ;;
        *) echo "install.sh: unknown option $1 (try --help)" >&2; exit 2 ;;
    esac
done
EXTRAS="$(printf '%s' "${EXTRAS#,}" | tr -d ' ')"

# --- the environment
ENVIRONMENT="${VIRTUAL_ENV:-${CONDA_PREFIX:-$PWD/.venv}}"
PYTHON="$ENVIRONMENT/bin/python"
if [ ! -x "$PYTHON" ]; then
    for base in python3 python3.13 python3.12 python3.11 ""; do
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    [ -n "$base" ] || { echo "install.sh: Python 3.11 or newer is needed." >&2; exit 1; }
    "$base" -m venv "$ENVIRONMENT"
fi
install() { "$PYTHON" -m pip install $([ -t 1 ] || echo -qq) --disable-pip-version-check "$@"; }

# Unchanged since the last run: nothing to do.
STAMP="$ENVIRONMENT/.seed_multimodal" DONE="$PWD $(cat pyproject.toml install.sh | cksum) $EXTRAS $LAVIS"
if grep -qxF "$DONE" "$STAMP" 2>/dev/null; then echo "[install] already installed in $ENVIRONMENT"; exit; fi

# --- torch, then the rest
if ! "$PYTHON" -c 'import torch' 2>/dev/null && ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "[install] no NVIDIA GPU: installing PyTorch's CPU builds"
    install --isolated --index-url https://download.pytorch.org/whl/cpu --timeout 10 --retries 1 \
        "torch>=2.13" "torchvision>=0.28" 2>/dev/null ||
        echo "[install] PyTorch's index cannot be reached: torch comes from the package index"
fi
echo "[install] seed-multimodal${EXTRAS:+ with $EXTRAS}"
torch="$("$PYTHON" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' 2>/dev/null)" || torch=torch
install "$torch" --editable ".${EXTRAS:+[$EXTRAS]}"
if [ -n "$LAVIS" ]; then install --no-deps salesforce-lavis==1.0.2; fi

"$PYTHON" -c 'import torch, torchvision, transformers as t
print(f"[install] torch {torch.__version__}, torchvision {torchvision.__version__}, transformers {t.__version__}")'
echo "$DONE" >> "$STAMP"
echo "[install] done in $SECONDS s; to use it: source $ENVIRONMENT/bin/activate"
