# Sourced by both applications' scripts, in their folder: PYTHON runs them. An active environment (venv or conda) wins, then the
# repository's .venv (made by install.sh), then a python on the PATH.
for PYTHON in "${VIRTUAL_ENV:-/nowhere}/bin/python" "${CONDA_PREFIX:-/nowhere}/bin/python" ../.venv/bin/python; do
    [ -x "$PYTHON" ] && break
done
[ -x "$PYTHON" ] || PYTHON=$(command -v python3 || command -v python) || {
    echo "No Python found: run sh install.sh first." >&2
    exit 2
}
