#!/usr/bin/env bash
# Prepare a release, all but the upload: version and date, tests, documentation, wheel, audit, checksums in dist/.
#
#   bash scripts/release.sh 0.2.0                in a clean checkout of main
#   bash scripts/release.sh 0.2.0 --no-tests     where `bash scripts/test.sh` has just passed
#   bash scripts/release.sh 0.2.0 --no-audit     an SBOM only, where PyPI's list of vulnerabilities cannot be read
#
# Nothing is committed, tagged or sent: the commands for that are printed at the end.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
say() { printf '[release] %s\n' "$*"; }
fail() { say "$*" >&2; exit 1; }

VERSION="${1:-}" TESTS=1 AUDIT=""
[[ "$VERSION" =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || fail "usage: bash scripts/release.sh X.Y.Z [--no-tests] [--no-audit]"
for option in "${@:2}"; do
    case "$option" in
        --no-tests) TESTS="" ;;
        --no-audit) AUDIT=--sbom-only ;;
        *) fail "unknown option $option" ;;
    esac
done
TODAY="$(date +%Y-%m-%d)"

# --- what must hold before
FILES="CHANGELOG.md CITATION.cff src/seed_multimodal/__init__.py"
[ -z "$(git status --porcelain)" ] || fail "the checkout has changes: commit them first (after a release that failed: git checkout -- $FILES)."
if git rev-parse -q --verify "refs/tags/v$VERSION" > /dev/null; then fail "the tag v$VERSION exists already."; fi
grep -qxF "## $VERSION (unreleased)" CHANGELOG.md || fail "CHANGELOG.md has no heading '## $VERSION (unreleased)'."

# --- version and date (perl: sed -i differs between Linux and macOS)
VERSION="$VERSION" perl -pi -e 's/^__version__ = .*/__version__ = "$ENV{VERSION}"/' src/seed_multimodal/__init__.py
TODAY="$TODAY" perl -pi -e 's/^(## \Q'"$VERSION"'\E) \(unreleased\)/$1 ($ENV{TODAY})/' CHANGELOG.md
perl -ni -e 'print unless /^date-released:/' CITATION.cff
VERSION="$VERSION" TODAY="$TODAY" perl -pi -e \
    's/^version: .*/version: $ENV{VERSION}\ndate-released: "$ENV{TODAY}"/' CITATION.cff
git --no-pager diff --stat

# --- checks
if [ -n "$TESTS" ]; then say "tests"; bash scripts/test.sh; fi
say "documentation"
bash install.sh --extras docs
ROOT=$PWD
. scripts/environment.sh
"$PYTHON" -m mkdocs build --quiet --strict
say "wheel"
bash scripts/check_wheel.sh  # makes dist/ anew
[ -f "dist/seed_multimodal-$VERSION-py3-none-any.whl" ] || fail "dist/ has no wheel of version $VERSION."
say "packages"
bash scripts/audit.sh $AUDIT
(cd dist && shasum -a 256 -- *.whl *.tar.gz sbom.cdx.json > SHA256SUMS && cat SHA256SUMS)

cat <<EOF_NEXT
[release] dist/ is complete. After a look at git diff, and at the model cards of systems that were trained again:
    git commit -am "Release $VERSION" && git tag -a "v$VERSION" -m "SEED Multimodal $VERSION"
    git push origin main "v$VERSION"
    pip install twine && python -m twine upload dist/*.whl dist/*.tar.gz
and publish outputs/site/.
EOF_NEXT
