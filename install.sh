#!/usr/bin/env bash
# Install SEED Multimodal into the active environment (venv or conda), or into .venv (made here) when none is active.
#
#   bash install.sh                          core: everything inference needs
#   bash install.sh --extras demo,eval,dev   with extras of pyproject.toml (train, demo, eval, lavit, laptop, docs, dev)
#   bash install.sh --lavis                  with salesforce-lavis (without its 2023 pins) for SEED_Tokenizer/
#   bash install.sh --constraints constraints/newest.txt    those versions, checked by hash (oldest.txt: the lower bounds)
#   bash install.sh --force                  again, although it was done before
#
# An installed torch is kept. Otherwise torch and torchvision come from the package index (on Linux about 3 GB, for
# NVIDIA GPUs); without a GPU their CPU builds (0.2 GB) are preferred, from PyTorch's CPU index or pip's find-links
# (--constraints: of the file's versions, but the file has the hashes of the package index's builds only).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
say() { printf '[install] %s\n' "$*"; }
fail() { say "$*" >&2; exit 1; }

EXTRAS="" LAVIS="" CONSTRAINTS="" FORCE=""
while [ $# -gt 0 ]; do
    case "$1" in
        --extras) EXTRAS="$EXTRAS,${2:?--extras needs a list, for example demo,dev}"; shift 2 ;;
        --lavis) LAVIS=1; shift ;;
        --constraints) CONSTRAINTS="${2:?--constraints needs a file, for example constraints/newest.txt}"; shift 2 ;;
        --force) FORCE=1; shift ;;
        -h|--help) sed -n '2,12s/^# \{0,1\}//p' install.sh; exit ;;
        *) echo "install.sh: unknown option $1 (try --help)" >&2; exit 2 ;;
    esac
done
EXTRAS="$(printf '%s' "${EXTRAS#,}" | tr -d ' ')"
case "${CONSTRAINTS:+,$EXTRAS,}" in
    *,harness,*) fail "$CONSTRAINTS has no versions for the extra harness: install it without --constraints." ;;
esac

# --- the environment
ENVIRONMENT="${VIRTUAL_ENV:-${CONDA_PREFIX:-$PWD/.venv}}"
PYTHON="$ENVIRONMENT/bin/python"
if [ ! -x "$PYTHON" ]; then
    [ "$ENVIRONMENT" = "$PWD/.venv" ] || fail "the active environment $ENVIRONMENT has no Python: deactivate it."
    for base in python3 python3.13 python3.12 python3.11 python3.14 ""; do
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    [ -n "$base" ] || fail "Python 3.11 or newer is needed."
    say "making $ENVIRONMENT with $base"
    "$base" -m venv "$ENVIRONMENT"
fi
STAMP="$ENVIRONMENT/.seed_multimodal" DONE="$PWD $(cat pyproject.toml install.sh $CONSTRAINTS | cksum) $EXTRAS $LAVIS"
if [ -z "$FORCE" ] && grep -qxF "$DONE" "$STAMP" 2>/dev/null; then say "already installed in $ENVIRONMENT"; exit; fi
"$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null
install() { "$PYTHON" -m pip install $([ -t 1 ] || echo -qq) --disable-pip-version-check "$@"; }
version() { "$PYTHON" -c 'import sys, importlib.metadata as m; print(m.version(sys.argv[1]))' "$1" 2>/dev/null; }

# --- torch, then the rest
TORCH="torch>=2.13" TORCHVISION="torchvision>=0.28"
if [ -n "$CONSTRAINTS" ]; then
    TORCH="$(grep -oE '^torch==[^ ;]+' "$CONSTRAINTS")" TORCHVISION="$(grep -oE '^torchvision==[^ ;]+' "$CONSTRAINTS")"
fi
if ! version torch >/dev/null && ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
    say "no NVIDIA GPU: looking for a CPU build of torch"
    index=(--isolated --index-url https://download.pytorch.org/whl/cpu --timeout 10 --retries 1)
    install "${index[@]}" "$TORCH" "$TORCHVISION" 2>/dev/null || install --no-index --no-deps "$TORCH" 2>/dev/null ||
        say "there is none here: taking the package index's build (about 3 GB to download, runs without a GPU, too)"
fi
say "seed-multimodal${EXTRAS:+ with $EXTRAS}"
torch="$(version torch)" || true
if [ -z "$CONSTRAINTS" ]; then
    install "torch${torch:+==$torch}" --editable ".${EXTRAS:+[$EXTRAS]}"
else
    # pip checks no hashes of a package that is a folder: first what it needs, then the package alone.
    install 'pip>=26'  # takes versions and hashes of unpinned requirements from constraints
    # Its build uses the checked setuptools, too: an isolated build would download one without a check.
    requirements="$("$PYTHON" -c 'import sys, tomllib
settings = tomllib.load(open("pyproject.toml", "rb"))
project = settings["project"]
requirements = settings["build-system"]["requires"] + project["dependencies"]
for extra in filter(None, sys.argv[1].split(",")):
    requirements += project["optional-dependencies"][extra]
print("\n".join(requirements))' "$EXTRAS")"
    install --require-hashes --constraint "$CONSTRAINTS" --requirement /dev/stdin <<< "$requirements"
    install --no-deps --no-build-isolation --editable .
fi
# Without what it needs: it pins packages of 2023.
if [ -n "$LAVIS" ] && [ -z "$CONSTRAINTS" ]; then
    install --no-deps salesforce-lavis==1.0.2
elif [ -n "$LAVIS" ]; then
    install --no-deps --require-hashes --requirement /dev/stdin <<< "salesforce-lavis==1.0.2 \
        --hash=sha256:489782efc2d98d8e878112b2758f82ac2e6c10dfcfa087db6656465c7784d49f"
fi

# A CPU build of torch cannot load the operators of torchvision's CUDA build, the only one that the package index has;
# torchvision can be imported all the same once the names of two are declared. Nothing here calls its operators.
if ! "$PYTHON" -c 'import torchvision' 2>/dev/null; then
    say "no torchvision for torch $torch here: declaring the operators that its build for CUDA cannot load"
    cat >> "$("$PYTHON" -c 'import importlib.util as u; print(u.find_spec("torchvision").submodule_search_locations[0])')/extension.py" <<'EOF'

if not _has_ops() and not hasattr(torch.ops.torchvision, "nms"):  # added by install.sh of SEED Multimodal
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
EOF
fi
"$PYTHON" -c 'import torch, torchvision, transformers as t
print(f"[install] torch {torch.__version__}, torchvision {torchvision.__version__}, transformers {t.__version__}")'
echo "$DONE" >> "$STAMP"
say "done in $SECONDS s; to use it: source $ENVIRONMENT/bin/activate"
