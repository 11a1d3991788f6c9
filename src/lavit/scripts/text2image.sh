#!/bin/sh
# FID of drawings of COCO's captions, the best of four by CLIP each, by the pixel decoder of 512 pixels.
exec sh "$(dirname "$0")/evaluate.sh" --task_name text2image --resolution 512 "$@"
