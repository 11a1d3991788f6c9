# The functions of run.sh; `seed init` writes the variables (head in recipe.yaml) before and the steps behind them.
# shellcheck shell=bash disable=SC1091,SC2034,SC2153,SC2154
set -euo pipefail

train() ( # FOLDER PROGRAM ARGUMENTS…
    cd "$REPOSITORY/$1"
    PROGRAM=$2
    shift 2
    . ../scripts/launch.sh
    launch 20002 "$@"
)

run() ( # ARGUMENTS…
    cd "$REPOSITORY/MultiModalLLM"
    ROOT=..
    . ../scripts/environment.sh
    PYTHONPATH=$REPOSITORY/src exec "$PYTHON" "$@"
)

check_names() { # NAMES…: the arguments of run.sh must be some of them
    for name in $STEPS; do
        case " $* " in
            *" $name "*) ;;
            *) echo "run.sh: no step $name; the steps are $*" >&2; exit 2 ;;
        esac
    done
}

step() { # NAME RESULT COMMAND…
    name=$1 result=$2
    shift 2
    case $STEPS in
        "  ") [ -n "$result" ] || return 0 ;;
        *" $name "*) ;;
        *) return 0 ;;
    esac
    if [ -n "$result" ] && [ -e "$OUT/$result" ]; then
        echo "== $name: finished ($OUT/$result)" >&2
        return 0
    fi
    echo "== $name" >&2
    "$@"
}

