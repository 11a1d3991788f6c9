#!/usr/bin/env bash
# nano-x, a tiny SEED-X, on top of a finished nano, and a report on it; each stage continues where it stopped.
#   bash scripts/nano_x_speedrun.sh               full settings (one GPU)
#   bash scripts/nano_x_speedrun.sh --cpu         what a 2-core machine does in under two hours
#   bash scripts/nano_x_speedrun.sh --pico        the same line in minutes on 2 CPU cores
# Options: --config FILE  --work DIR  --out DIR  --no-report; further words are dotted settings (start=FOLDER of nano).
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
. scripts/speedrun.sh
read_options nano_x "$@"
needs_hydra

app() {  # app PROGRAM NAME
  echo "== $2"
  "$python" "MultiModalLLM/src/train/$1.py" --config-path "$work" --config-name "$2"
}
decoder() {
  stages layout
  app train_seed_x_detokenizer first
  app train_seed_x_detokenizer second
}
language_model() {
  app train_seed_x_sft sft
  stages agent
}

OMP_NUM_THREADS=$cores stages start,tower,recipes "$cores"
export OMP_NUM_THREADS=$half
both decoder language_model
stages assemble
if [ "$report" = 1 ]; then
  amount=()
  [ "$name" != pico ] || amount=(--limit 24)
  nano=$(sed -n 's/^start: //p' "$work/config.yaml")
  "$python" -m seed_multimodal.evaluation.report --model "$out" --judge "$nano/judge" --out "$out/report" \
    ${amount[@]+"${amount[@]}"}
  echo "The report card is $out/report/report.md."
fi
finished nano-x
