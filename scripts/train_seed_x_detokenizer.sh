#!/bin/sh
# Train SEED-X's de-tokenizer; the first argument is the stage (1 or 2), further ones are overrides. Paths of images and
# weights count from MultiModalLLM, where the configurations are:
#
#   sh scripts/train_seed_x_detokenizer.sh 1 data=my_pictures.yaml output_dir=log/mine
exec sh "$(dirname "$0")/../MultiModalLLM/scripts/train_seed_x_detokenizer.sh" "$@"
