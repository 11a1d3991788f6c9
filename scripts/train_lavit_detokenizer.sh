#!/bin/sh
# Train one of LaVIT's pixel decoders; the first argument says which (highres or lowres), further ones are overrides. Paths
# of images and weights count from MultiModalLLM, where the configurations are:
#
#   sh scripts/train_lavit_detokenizer.sh lowres data=my_pictures.yaml output_dir=log/mine
exec sh "$(dirname "$0")/../MultiModalLLM/scripts/train_lavit_detokenizer.sh" "$@"
