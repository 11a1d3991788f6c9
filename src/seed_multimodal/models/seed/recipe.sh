# The functions of run.sh; `seed init` writes the variables (head in recipe.yaml) before and the steps behind them.
# shellcheck shell=bash disable=SC1091,SC2034,SC2153,SC2154
set -euo pipefail
unset CDPATH

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

follow_folder() { # ARGUMENTS…: after a move or copy the YAML files and this script name the folder in which they are now
    folder=$(cd "$(dirname "$0")" && pwd)
    [ "$folder" != "$OUT" ] || return 0
    echo "run.sh: this folder was $OUT; its YAML files and run.sh now say $folder" >&2
    for file in "$folder"/*.yaml "$folder/run.sh"; do
        sed "s|$OUT|$folder|g" "$file" >"$file.new"
        cat "$file.new" >"$file"
        rm "$file.new"
    done
    exec bash "$folder/run.sh" "$@"
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

# .steps/NAME holds what step NAME last ran with: `runs` (how often it was started), `inputs` (PATH@RUNS of the step that makes
# it) and `files` (NAME:CHECKSUM of its YAML files). No times, so that a copied folder is as finished as the first one.
recorded() { # NAME KEY
    sed -n "s/^$2 //p" "$OUT/.steps/$1" 2>/dev/null || true
}

inputs_with_runs() { # PATHS…
    for input in "$@"; do
        maker=${MADE##* "$input"=}
        echo "$input@$(recorded "${maker%% *}" runs)"
    done | paste -s -d " " -
}

yaml_checksums() { # COMMAND…
    for word in "$@"; do
        file=${word#*=}
        case $file in
            "$OUT"/*/*) ;; # written by a training
            "$OUT"/*.yaml) echo "${file##*/}:$(sed "s|$OUT|OUT|g" "$file" | cksum | cut -d " " -f 1)" ;;
        esac
    done | paste -s -d " " -
}

changed_files() { # NAME CHECKSUMS: the YAML files that have changed since the step ran
    for file in $2; do
        case " $(recorded "$1" files) " in
            *" $file "*) ;;
            *) echo "${file%:*}" ;;
        esac
    done | paste -s -d " " -
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

MADE= # " RESULT=NAME …" of the steps so far
step() { # NAME INPUTS RESULT COMMAND…
    name=$1 result=$3
    # shellcheck disable=SC2086
    inputs=$(inputs_with_runs $2)
    paths=$2
    MADE="$MADE $result=$name"
    shift 3
    case $STEPS in
        "  ") [ -n "$result" ] || return 0 ;;
        *" $name "*) ;;
        *) return 0 ;;
    esac
    for input in $paths; do
        if [ ! -e "$OUT/$input" ]; then
            echo "run.sh: step $name reads $OUT/$input, which does not exist; run the steps before it" >&2
            exit 2
        fi
    done

    # 1. A finished step is skipped; one with other inputs begins again.
    mkdir -p "$OUT/.steps"
    record=$OUT/.steps/$name
    node=${NODE_RANK:-${INDEX:-0}} # the first one writes for all
    files=$(yaml_checksums "$@")
    changed=
    [ ! -e "$record" ] || changed=$(changed_files "$name" "$files")
    if [ -n "$result" ] && [ -e "$record" ] && [ "$(recorded "$name" inputs)" != "$inputs" ]; then
        [ "$node" != 0 ] || set_aside "$OUT/${result%/*}"
    elif [ -n "$result" ] && [ -e "$OUT/$result" ] && [ ! -e "$record.unfinished" ]; then
        echo "== $name: finished ($OUT/$result)" >&2
        [ -z "$changed" ] || echo "== $name: $changed changed since; to make it again, move $OUT/${result%/*} away" >&2
        return 0
    fi
    [ -z "$changed" ] || echo "== $name: $changed changed since it was last started" >&2

    # 2. SIGTERM and Ctrl-C also end the command, and are waited for: a training saves a checkpoint at SIGTERM.
    echo "== $name" >&2
    if [ "$node" = 0 ]; then
        touch "$record.unfinished"
        runs=$(recorded "$name" runs)
        printf 'runs %s\ninputs %s\nfiles %s\n' "$((${runs:-0} + 1))" "$inputs" "$files" >"$record.new"
        mv "$record.new" "$record"
    fi
    "$@" &
    child=$!
    trap 'kill "$child"; wait "$child"; exit' INT TERM
    wait "$child"
    [ "$node" != 0 ] || rm -f "$record.unfinished"

    # 3. A training that was longer before ends without its new result.
    if [ -n "$result" ] && [ ! -e "$OUT/$result" ]; then
        echo "run.sh: step $name ended without $OUT/$result; is it shorter than before?" >&2
        exit 1
    fi
}

