#!/usr/bin/env bash
# Install SEED Multimodal into the active environment, or into .venv (made here) when none is active.
#
#   bash install.sh                          core: everything inference needs
#   bash install.sh --extras demo,eval,dev   with extras of pyproject.toml (train, gpu, lavis, demo, eval, lavit, data, dev)
#   bash install.sh --lavis                  with salesforce-lavis (without its 2023 pins) for SEED_Tokenizer/
#   bash install.sh --force                  again, although it was done before
#
# uv is used when present, else pip. Which torch: SEED_TORCH="torch==2.13.0" if set; one already installed is kept;
# with an NVIDIA GPU (or on a Mac) the package index's build; otherwise a CPU build (1.4 GB instead of 5.8 GB in all)
# from pip's find-links or PyTorch's CPU index, where one can be had; else the package index's build, which also runs
# without a GPU. Everything else follows the installed torch. Which Python: SEED_PYTHON=/path if set, else the first of
# python3 and python3.11 to python3.14 that is new enough; where a CPU build is wanted, one that has it is preferred.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
PYTHON="$ENVIRONMENT/bin/python"
cd "$ROOT"

EXTRAS="" LAVIS=0 FORCE=0
while [ $# -gt 0 ]; do
    case "$1" in
        --extras) EXTRAS="${EXTRAS:+$EXTRAS,}${2:?--extras needs a list, for example demo,dev}"; shift 2 ;;
        --extras=*) EXTRAS="${EXTRAS:+$EXTRAS,}${1#*=}"; shift ;;
        --lavis) LAVIS=1; EXTRAS="${EXTRAS:+$EXTRAS,}lavis"; shift ;;
        --force) FORCE=1; shift ;;
        -h|--help) sed -n '2,13p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; exit 0 ;;
        *) echo "install.sh: unknown option $1 (try --help)" >&2; exit 2 ;;
    esac
done

EXTRAS="$(printf '%s' "$EXTRAS" | tr -d ' ')"
case ",$EXTRAS," in *,lavis,*) LAVIS=1 ;; esac  # without the package itself the extra is of no use

say() { printf '[install] %s\n' "$*"; }
fail() { printf '[install] %s\n' "$*" >&2; exit 1; }

KNOWN="$(sed -n '/^\[project\.optional-dependencies\]/,/^\[project\.scripts\]/s/^\([a-z]*\) = .*/\1/p' pyproject.toml)"
for extra in $(printf '%s' "$EXTRAS" | tr ',' ' '); do  # pip only warns of it
    printf '%s\n' "$KNOWN" | grep -qx -- "$extra" || fail "there is no extra $extra: use $(printf '%s' "$KNOWN" | tr '\n' ' ')."
done
check_place() { [ -w "$ROOT" ] || fail "$ROOT cannot be written by $(id -un), and installing writes there: take a clone of your own."; }

# --- the environment -------------------------------------------------------------------------------------------------
modern_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
has_nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }
wants_cpu_torch() { [ -z "${SEED_TORCH:-}" ] && [ "$(uname -s)" = Linux ] && ! has_nvidia_gpu; }

CPU_INDEX="https://download.pytorch.org/whl/cpu"
cpu_torch() {  # VERSION PIP_OPTIONS…: the newest CPU build of torch (2.11 or newer) for that Python, or nothing
    "$PYTHON" -m pip index versions torch --python-version "$1" --only-binary=:all: --timeout 4 --retries 0 "${@:2}" \
        2>/dev/null | grep -oE '[0-9.]+\+cpu' | awk -F. '$1 > 2 || ($1 == 2 && $2 >= 11)' | head -n 1 || true
}
any_cpu_torch() { [ -n "$(cpu_torch "$1" --no-index)$(cpu_torch "$1" --index-url "$CPU_INDEX")" ]; }

environment_with() {  # PYTHON
    rm -rf "$ENVIRONMENT"
    if command -v uv >/dev/null; then uv venv --quiet --seed --clear --python "${1:-3.12}" "$ENVIRONMENT"; return; fi
    [ -n "$1" ] || fail "Python 3.11 or newer is needed: install it, or name one with SEED_PYTHON=/path/to/python3.11."
    "$1" -m venv "$ENVIRONMENT" || fail "$1 cannot make an environment: on Debian, apt-get install python3-venv."
}

make_environment() {
    local candidate found=() versions=""
    check_place
    for candidate in "${SEED_PYTHON:-}" python3 python python3.13 python3.12 python3.11 python3.14; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null && modern_python "$candidate" || continue
        case "$versions" in *"|$(version_of "$candidate")|"*) continue ;; esac
        found+=("$candidate") versions="$versions|$(version_of "$candidate")|"
        [ "$candidate" != "${SEED_PYTHON:-}" ] || break
    done
    say "making the environment $ENVIRONMENT"
    environment_with "${found[0]:-}"
    if [ "${#found[@]}" -lt 2 ] || ! wants_cpu_torch || any_cpu_torch "$(version_of "$PYTHON")"; then return; fi
    for candidate in "${found[@]:1}"; do
        if any_cpu_torch "$(version_of "$candidate")"; then
            say "torch has a CPU build for $candidate, but none for Python $(version_of "$PYTHON"): taking $candidate"
            environment_with "$candidate"
            return
        fi
    done
}

if ! modern_python "$PYTHON"; then
    [ "$ENVIRONMENT" = "$ROOT/.venv" ] || fail "the active environment $ENVIRONMENT has no Python 3.11 or newer: deactivate it, or activate another."
    make_environment
fi

# --- done before? ----------------------------------------------------------------------------------------------------
STAMP="$ENVIRONMENT/.seed_multimodal"
WANTED="$(printf '%s' "$EXTRAS" | tr ',' '\n' | sed '/^$/d' | sort -u)"
FINGERPRINT="$ROOT $(cksum < pyproject.toml)"
if [ "$FORCE" = 0 ] && [ -f "$STAMP" ] && [ "$(head -n 1 "$STAMP")" = "$FINGERPRINT" ]; then
    MISSING="$(comm -23 <(printf '%s\n' "$WANTED" | sed '/^$/d') <(tail -n +2 "$STAMP" | sort -u))"
    if [ -z "$MISSING" ] && "$PYTHON" -c 'import seed_multimodal' 2>/dev/null; then
        say "already installed in $ENVIRONMENT"; exit 0
    fi
    WANTED="$(printf '%s\n' "$WANTED" "$(tail -n +2 "$STAMP")" | sed '/^$/d' | sort -u)"
fi
SECONDS=0
check_place

# --- the installer ---------------------------------------------------------------------------------------------------
# uv does not read pip's settings; hand over those that say where packages are.
pip_setting() { "$PYTHON" -m pip config list 2>/dev/null | sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" | tail -n 1; }

if command -v uv >/dev/null; then
    "$PYTHON" -m pip --version >/dev/null 2>&1 || uv pip install --quiet --python "$PYTHON" pip
    [ -n "${UV_FIND_LINKS:-}" ] || { v="$(pip_setting find-links)"; [ -z "$v" ] || export UV_FIND_LINKS="${v// /,}"; }
    [ -n "${UV_INDEX_URL:-}${UV_DEFAULT_INDEX:-}" ] || { v="$(pip_setting index-url)"; [ -z "$v" ] || export UV_DEFAULT_INDEX="$v"; }
    [ -n "${SSL_CERT_FILE:-}" ] || { v="$(pip_setting cert)"; [ -z "$v" ] || export SSL_CERT_FILE="$v"; }
fi

packages() {  # OPTIONS…: quietly, but on a terminal and with LOUD=1 with the installer's own sizes and progress bars
    local quiet=--quiet
    [ -z "${LOUD:-}" ] && [ ! -t 1 ] || quiet=""
    if command -v uv >/dev/null; then
        uv pip install $quiet --python "$PYTHON" "$@" && return
        say "uv could not do it; trying pip"
    fi
    # pip repeats a warning for every configured place that lacks a package; its errors stay visible.
    "$PYTHON" -m pip install $quiet --disable-pip-version-check "$@" 2> >(grep -v '^WARNING: Location' >&2)
}

# --- torch -----------------------------------------------------------------------------------------------------------
installed_torch() { "$PYTHON" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true; }

install_torch() {
    local version python LOUD=1
    if [ -n "${SEED_TORCH:-}" ]; then
        say "torch: $SEED_TORCH, as asked"; packages "$SEED_TORCH"; return
    fi
    version="$(installed_torch)"
    if [ -n "$version" ]; then
        say "torch: $version is already there"; return
    fi
    if wants_cpu_torch; then
        python="$(version_of "$PYTHON")"
        version="$(cpu_torch "$python" --no-index)"
        if [ -n "$version" ]; then
            say "torch: no NVIDIA GPU here; CPU build $version from find-links (about 0.2 GB)"
            packages "torch==$version" && return
        fi
        version="$(cpu_torch "$python" --index-url "$CPU_INDEX")"
        if [ -n "$version" ]; then
            say "torch: no NVIDIA GPU here; CPU build $version from PyTorch's CPU index (about 0.2 GB to download)"
            packages --index-url "$CPU_INDEX" "torch==$version" torchvision && return
        fi
        say "torch: no NVIDIA GPU here and no CPU build for Python $python within reach; the index's build (about 3 GB to download, runs without a GPU too)"
    else
        say "torch: the package index's build (on Linux about 3 GB to download)"
    fi
    packages 'torch>=2.11'
}

install_torch
CONSTRAINT="$(mktemp)"
trap 'rm -f "$CONSTRAINT"' EXIT
echo "torch==$(installed_torch)" > "$CONSTRAINT"

# --- the rest --------------------------------------------------------------------------------------------------------
LIST="$(printf '%s' "$WANTED" | tr '\n' ',' | sed 's/,$//')"
say "seed-multimodal${LIST:+ with $LIST}"
packages --constraint "$CONSTRAINT" --editable ".${LIST:+[$LIST]}"
if [ "$LAVIS" = 1 ]; then
    say "salesforce-lavis 1.0.2, without its dependencies"
    packages --no-deps salesforce-lavis==1.0.2
fi

"$PYTHON" -c 'from seed_multimodal import torchvision_shim
torchvision_shim.install()
import torch, torchvision, transformers
print(f"[install] Python imports torch {torch.__version__}, torchvision {torchvision.__version__}, transformers {transformers.__version__}")'
printf '%s\n' "$FINGERPRINT" "$WANTED" > "$STAMP"
say "done in ${SECONDS} s: $ENVIRONMENT"
[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || say "to use it yourself: source .venv/bin/activate"
