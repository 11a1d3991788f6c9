#!/usr/bin/env bash
# Look up the packages of constraints/newest.txt in PyPI's list of vulnerabilities, and write a CycloneDX SBOM of them.
#
#   bash scripts/audit.sh                dist/sbom.cdx.json; exit code 1 where a vulnerability is known or no list could be read
#   bash scripts/audit.sh --sbom-only
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK"
"$WORK/bin/pip" install -q --no-compile --disable-pip-version-check pip-audit cyclonedx-bom

mkdir -p dist
"$WORK/bin/cyclonedx-py" requirements constraints/newest.txt --pyproject pyproject.toml --mc-type library \
    --output-reproducible --output-format JSON --output-file dist/sbom.cdx.json
echo "[audit] dist/sbom.cdx.json: $(grep -c '"type": "library"' dist/sbom.cdx.json) packages"
if [ "${1:-}" = --sbom-only ]; then exit; fi

# The file is complete and pinned: nothing is resolved or installed.
"$WORK/bin/pip-audit" --strict --disable-pip --no-deps --progress-spinner off -r constraints/newest.txt
