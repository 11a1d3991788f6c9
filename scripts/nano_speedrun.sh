#!/usr/bin/env bash
# Train every part of nano from scratch and report on it; each stage continues where it stopped.
#   bash scripts/nano_speedrun.sh               full settings (one GPU)
#   bash scripts/nano_speedrun.sh --cpu         what a 2-core machine does in under four hours
#   bash scripts/nano_speedrun.sh --pico        the same line in under ten minutes on 2 CPU cores
# Options: --config FILE  --work DIR  --out DIR  --no-report; further words are dotted settings.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
. scripts/speedrun.sh
read_options nano "$@"

judge=$out/judge
amount=()
if [ "$name" = pico ] && [ -f pretrained/nano/judge/model.safetensors ]; then
  judge=pretrained/nano/judge  # training a judge of its own would take longer than everything before it
  amount=(--limit 24)
fi

"$python" -c 'import importlib.util as u; s = u.find_spec("lavis"); raise SystemExit(s is None or s.origin is None)' || {
  echo "The tokenizer is trained through LAVIS, which is not installed: bash install.sh --lavis" >&2; exit 2; }
needs_hydra

# Settings that are wrong end the script here, with one sentence.
read_steps="import sys; from seed_multimodal.entry import guarded; from seed_nano.train.config import load_config
sys.exit(guarded('nano training', False, lambda: print(load_config(sys.argv[1], sys.argv[2:]).judge_steps) or 0))"
judge_steps=$("$python" -c "$read_steps" "$config" ${overrides[@]+"${overrides[@]}"})

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
  "$python" -m seed_nano.report.judge --out "$judge" --work "$work/judge" --steps "$judge_steps"
}

export OMP_NUM_THREADS=$half
both vae clip
both decoder tokenizer
both decoder_of_codes language_model
stages assemble
write_domain
if [ "$report" = 1 ]; then
  "$python" -m seed_nano.report --model "$out" --judge "$judge" --out "$out/report" \
    ${amount[@]+"${amount[@]}"}
  echo "The report card is $out/report/report.md."
fi
finished nano
