#!/usr/bin/env bash
# Resolve the oldest and the newest versions that pyproject.toml allows, for all systems and Python 3.11 to 3.13,
# into constraints/oldest.txt and constraints/newest.txt (pip install --require-hashes -r FILE). Needs uv (pip install uv).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS=(train demo eval lavit docs dev)  # laptop is compiled, harness wants an environment of its own, ray the cluster's version

for stack in oldest newest; do
    resolution=highest
    [ "$stack" = newest ] || resolution=lowest-direct
    uv pip compile -q pyproject.toml "${EXTRAS[@]/#/--extra=}" --universal --python-version 3.11 \
        --resolution "$resolution" --upgrade --generate-hashes --no-emit-index-url --no-annotate --no-header \
        --output-file "constraints/$stack.txt"
    echo "constraints/$stack.txt: $(grep -c == "constraints/$stack.txt") packages"
done
