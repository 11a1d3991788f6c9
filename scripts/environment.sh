# Sourced by the other scripts: where the repository is, and which Python runs it.
# An active environment (venv or conda) wins; otherwise .venv in the repository, which install.sh makes; otherwise a
# python on the PATH that has the package.
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -n "${VIRTUAL_ENV:-}" ]; then
    ENVIRONMENT="$VIRTUAL_ENV"
elif [ -n "${CONDA_PREFIX:-}" ]; then
    ENVIRONMENT="$CONDA_PREFIX"
else
    ENVIRONMENT="$ROOT/.venv"
fi
PYTHON="$ENVIRONMENT/bin/python"
if [ ! -x "$PYTHON" ] && command -v python3 >/dev/null && python3 -c 'import seed_multimodal' 2>/dev/null; then
    PYTHON="$(command -v python3)"
fi
