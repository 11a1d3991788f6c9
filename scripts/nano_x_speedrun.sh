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
write_domain
report_on_start 24
finished nano-x
