#!/usr/bin/env bash
# Train every part of nano from scratch and report on it; each stage continues where it stopped.
#   bash scripts/nano_speedrun.sh               full settings (one GPU)
#   bash scripts/nano_speedrun.sh --cpu         what a 2-core machine does in under four hours
#   bash scripts/nano_speedrun.sh --pico        the same line in minutes on 2 CPU cores
# Options: --config FILE  --work DIR  --out DIR  --no-report; further words are dotted settings.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

config=configs/nano/full.yaml
name=full
work=""
out=""
report=1
overrides=()
from_here() {  # from_here PATH: as it was meant where the script was called
  case "$1" in /*) echo "$1" ;; *) echo "$here/$1" ;; esac
}

while [ $# -gt 0 ]; do
  case "$1" in --config|--work|--out)
    [ -n "${2:-}" ] || { echo "$1 needs a file or folder: see --help." >&2; exit 2; } ;;
  esac
  case "$1" in
    --pico) config=configs/nano/pico.yaml; name=pico ;;
    --cpu) config=configs/nano/cpu.yaml; name=cpu ;;
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
work=${work:-runs/$name}
out=${out:-$work/system}

python=${PYTHON:-python}
[ -n "${PYTHON:-}" ] || [ -n "${VIRTUAL_ENV:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)  # those this process may use
half=$(( cores > 1 ? cores / 2 : 1 ))
started=$SECONDS

stages() {  # stages NAMES
  "$python" -m seed_multimodal.training.nano --config "$config" --work "$work" --out "$out" --only "$1" \
    --threads "$half" ${overrides[@]+"${overrides[@]}"}
}

judge=$out/judge
amount=()
if [ "$name" = pico ] && [ -f pretrained/nano/judge/model.safetensors ]; then
  judge=pretrained/nano/judge  # training a judge of its own would take longer than everything before it
  amount=(--limit 24)
fi

"$python" -c 'import importlib.util as u; s = u.find_spec("lavis"); raise SystemExit(s is None or s.origin is None)' || {
  echo "The tokenizer is trained through LAVIS, which is not installed: bash install.sh --lavis" >&2; exit 2; }
"$python" -c 'import hydra' 2>/dev/null || {
  echo "The language model is trained through Hydra, which is not installed: bash install.sh --extras train" >&2; exit 2; }

# Settings that are wrong end the script here, with one sentence.
read_steps="import sys; from seed_multimodal.entry import guarded; from seed_multimodal.training.nano.config import load_config
sys.exit(guarded('nano training', False, lambda: print(load_config(sys.argv[1], sys.argv[2:]).judge_steps) or 0))"
judge_steps=$("$python" -c "$read_steps" "$config" ${overrides[@]+"${overrides[@]}"})

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

vae() { stages vae; }
clip() { stages clip; }
decoder() { stages unet; }
tokenizer() {
  stages recipe
  for stage in stage1 stage2; do
    echo "== $stage"
    "$python" SEED_Tokenizer/train.py --cfg-path "$work/$stage.yaml"
  done
  stages tokenizer,codes
}
decoder_of_codes() { stages unet2; train_judge; }
language_model() {
  stages records
  for stage in llm_pretrain llm_sft; do
    echo "== $stage"
    "$python" MultiModalLLM/src/train/train.py --config-path "$work" --config-name "$stage"
  done
  stages llm
}
train_judge() {
  [ "$report" = 1 ] && [ "$judge" = "$out/judge" ] && [ ! -f "$judge/config.json" ] || return 0
  echo "== judge"
  "$python" -m seed_multimodal.evaluation.train_judge --out "$judge" --work "$work/judge" --steps "$judge_steps"
}

export OMP_NUM_THREADS=$half
both vae clip
both decoder tokenizer
both decoder_of_codes language_model
stages assemble
if [ "$report" = 1 ]; then
  "$python" -m seed_multimodal.evaluation.report --model "$out" --judge "$judge" --out "$out/report" \
    ${amount[@]+"${amount[@]}"}
  echo "The report card is $out/report/report.md."
fi
echo "The nano system is in $out (made in $(( (SECONDS - started) / 60 )) min $(( (SECONDS - started) % 60 )) s): seed chat --model $out"
