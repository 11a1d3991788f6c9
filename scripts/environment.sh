# Sourced by shell scripts that set ROOT, the repository: PYTHON is the interpreter of the active environment (venv or
# conda), of the repository's .venv (made by install.sh), or of the PATH.
for PYTHON in "${VIRTUAL_ENV:-/nowhere}/bin/python" "${CONDA_PREFIX:-/nowhere}/bin/python" "$ROOT/.venv/bin/python"; do
    [ -x "$PYTHON" ] && return
done
PYTHON=$(command -v python3 || command -v python) || { echo "No Python found: run bash install.sh first." >&2; exit 2; }
