#!/bin/sh
# CIDEr of captions: COCO, or --dataset nocaps or flickr. The data is in the original's places below data/, or where
# --annopath and --imagepath say.
exec sh "$(dirname "$0")/evaluate.sh" --task_name caption "$@"
