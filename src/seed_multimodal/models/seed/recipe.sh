# The functions of run.sh; `seed init` writes the variables (head in recipe.yaml) before and the steps behind them.
# shellcheck shell=bash disable=SC1091,SC2034,SC2153,SC2154
set -euo pipefail

train() { # FOLDER PROGRAM ARGUMENTS…
    cd "$REPOSITORY/$1"
    PROGRAM=$2
    shift 2
    . ../scripts/launch.sh
    launch 20002 "$@"
}

run() { # ARGUMENTS…
    cd "$REPOSITORY/MultiModalLLM"
    ROOT=..
    . ../scripts/environment.sh
    PYTHONPATH=$REPOSITORY/src exec "$PYTHON" "$@"
}

check_arguments() { # NAMES…: the arguments of run.sh must be some of them
    for name in $STEPS; do
        case " $* " in
            *" $name "*) ;;
            *) echo "run.sh: no step $name; the steps are $*" >&2; exit 2 ;;
        esac
    done
    [ "$STEPS" = "  " ] || return 0
    for path in $NEEDED; do # before the first of all steps
        if [ ! -e "$OUT/$path" ] && [ ! -e "$REPOSITORY/$path" ]; then
            echo "run.sh: $path does not exist; README.md says what it is" >&2
            exit 2
        fi
    done
}

# Whether the step began with other inputs, or before they were made: inputs_file names those that it began with, and is as
# old as its beginning.
is_outdated() {
    [ "$(cat "$inputs_file")" = "$inputs" ] || return 0
    for input in $inputs; do
        [ ! "$OUT/$input" -nt "$inputs_file" ] || return 0
    done
    return 1
}

set_aside() { # FOLDER: rename it to FOLDER-1, or the next number that is free
    [ -e "$1" ] || return 0
    number=1
    while [ -e "$1-$number" ]; do
        number=$((number + 1))
    done
    mv "$1" "$1-$number"
    echo "== $name: what it reads has changed; its earlier files are in $1-$number" >&2
}

step() { # NAME INPUTS RESULT COMMAND…
    name=$1 inputs=$2 result=$3
    shift 3
    case $STEPS in
        "  ") [ -n "$result" ] || return 0 ;;
        *" $name "*) ;;
        *) return 0 ;;
    esac
    for input in $inputs; do
        if [ ! -e "$OUT/$input" ]; then
            echo "run.sh: step $name reads $OUT/$input, which does not exist; run the steps before it" >&2
            exit 2
        fi
    done

    # 1. A finished step is skipped; one with other inputs begins again.
    mkdir -p "$OUT/.steps"
    inputs_file=$OUT/.steps/$name
    [ -e "$inputs_file" ] || echo "$inputs" >"$inputs_file"
    node=${NODE_RANK:-${INDEX:-0}} # the first one writes for all
    if [ -n "$result" ] && is_outdated; then
        if [ "$node" = 0 ]; then
            set_aside "$OUT/${result%/*}"
            echo "$inputs" >"$inputs_file"
        fi
    elif [ -n "$result" ] && [ -e "$OUT/$result" ] && [ ! -e "$inputs_file.unfinished" ]; then
        echo "== $name: finished ($OUT/$result)" >&2
        return 0
    fi

    # 2. SIGTERM and Ctrl-C also end the command, and are waited for: a training saves a checkpoint at SIGTERM.
    echo "== $name" >&2
    [ "$node" != 0 ] || touch "$inputs_file.unfinished"
    "$@" &
    child=$!
    trap 'kill "$child"; wait "$child"; exit' INT TERM
    wait "$child"
    [ "$node" != 0 ] || rm -f "$inputs_file.unfinished"

    # 3. A training that was longer before ends without its new result.
    if [ -n "$result" ] && [ ! -e "$OUT/$result" ]; then
        echo "run.sh: step $name ended without $OUT/$result; is it shorter than before?" >&2
        exit 1
    fi
}

