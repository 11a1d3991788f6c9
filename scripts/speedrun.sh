# Sourced by the speed runs, in the repository's folder: options, the Python that runs them, stages, two lines side by side.

read_options() {  # read_options SYSTEM WORDS…: config, name, work, out, report, overrides, python, cores, half
  system=$1; shift
  config=configs/$system/full.yaml
  name=full
  work=""
  out=""
  report=1
  overrides=()
  while [ $# -gt 0 ]; do
    case "$1" in --config|--work|--out)
      [ -n "${2:-}" ] || { echo "$1 needs a file or folder: see --help." >&2; exit 2; } ;;
    esac
    case "$1" in
      --pico) config=configs/$system/pico.yaml; name=pico ;;
      --cpu) config=configs/$system/cpu.yaml; name=cpu ;;
      --config) config=$2; name=$(basename "$2" .yaml); [ ! -e "$here/$2" ] || config=$(from_here "$2"); shift ;;
      --work) work=$(from_here "$2"); shift ;;
      --out) out=$(from_here "$2"); shift ;;
      --no-report) report=0 ;;
      -h|--help) sed -n '2,6p' "$0"; exit 0 ;;
      -*) echo "Unknown option $1: see --help." >&2; exit 2 ;;
      *) overrides+=("$1") ;;
    esac
    shift
  done
  kept=$name
  [ "$system" = nano ] || kept=$system-$name
  work=${work:-runs/$kept}
  out=${out:-$work/system}
  python=${PYTHON:-python}
  [ -n "${PYTHON:-}" ] || [ -n "${VIRTUAL_ENV:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
  export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)  # those this process may use
  half=$(( cores > 1 ? cores / 2 : 1 ))
  started=$SECONDS
}

from_here() {  # from_here PATH: as it was meant where the script was called
  case "$1" in /*) echo "$1" ;; *) echo "$here/$1" ;; esac
}

stages() {  # stages NAMES [THREADS]
  "$python" -m "seed_nano.train${system#nano}" --config "$config" --work "$work" --out "$out" --only "$1" \
    --threads "${2:-$half}" ${overrides[@]+"${overrides[@]}"}
}

app() {  # app PROGRAM NAME: a training of MultiModalLLM by work/NAME.yaml
  echo "== $2"
  "$python" "MultiModalLLM/src/train/$1.py" --config-path "$work" --config-name "$2"
}

write_domain() {  # what the system says of pictures and words that are not of nano's world
  amount=()
  [ "$name" != pico ] || amount=(--number 500)
  "$python" -m seed_nano.report.domain "$out" ${amount[@]+"${amount[@]}"}
}

report_on_start() {  # report_on_start LIMIT: the report card, by the judge of the nano that the run began with
  [ "$report" = 1 ] || return 0
  amount=()
  [ "$name" != pico ] || amount=(--limit "$1")
  nano=$(sed -n 's/^start: //p' "$work/config.yaml")
  "$python" -m seed_nano.report --model "$out" --judge "$nano/judge" --out "$out/report" \
    ${amount[@]+"${amount[@]}"}
  echo "The report card is $out/report/report.md."
}

needs_hydra() {
  "$python" -c 'import hydra' 2>/dev/null || {
    echo "The language model is trained through Hydra, which is not installed: bash install.sh --extras train" >&2; exit 2; }
}

# Two lines side by side, half of the cores each. If one fails or this script is stopped, both end, as after SIGTERM:
# what they have trained is saved.
both() {  # both FIRST SECOND
  set -m  # process groups of their own, so that their programs end with them
  { trap 'exit 143' TERM; "$1"; } &  # with a trap it ends after its program
  first=$!
  { trap 'exit 143' TERM; "$2"; } &
  second=$!
  set +m
  trap 'kill -- "-$first" "-$second" 2>/dev/null || true; wait' EXIT
  trap 'exit 143' TERM
  trap 'exit 130' INT
  while kill -0 "$first" 2>/dev/null && kill -0 "$second" 2>/dev/null; do sleep 1; done
  if kill -0 "$first" 2>/dev/null; then wait "$second"; wait "$first"; else wait "$first"; wait "$second"; fi
  trap - EXIT TERM INT
}

finished() {  # finished NAME
  echo "The $1 system is in $out (made in $(( (SECONDS - started) / 60 )) min $(( (SECONDS - started) % 60 )) s): seed chat --model $out"
}
