#!/usr/bin/env bash
# nano-lavit, a tiny LaVIT, on top of a finished nano, and a report on it; each stage continues where it stopped.
#   bash scripts/nano_lavit_speedrun.sh               full settings (one GPU)
#   bash scripts/nano_lavit_speedrun.sh --cpu         what a 2-core machine does in under two hours
#   bash scripts/nano_lavit_speedrun.sh --pico        the same line in minutes on 2 CPU cores
# Options: --config FILE  --work DIR  --out DIR  --no-report; further words are dotted settings (start=FOLDER of nano).
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
. scripts/speedrun.sh
read_options nano_lavit "$@"
needs_hydra

pixel_decoder() { app train_lavit_detokenizer pixels; }
language_model() { app train_lavit language; }

OMP_NUM_THREADS=$cores stages reader,tokenizer,narrow,layout,recipes "$cores"
export OMP_NUM_THREADS=$half
both pixel_decoder language_model
stages llm,assemble
write_domain
report_on_start 24
finished nano-lavit
