#!/bin/sh
# CIDEr of captions: COCO, or --dataset nocaps or flickr; data in the original's places below data/, or --annopath and --imagepath.
exec sh "$(dirname "$0")/evaluate.sh" --task_name caption "$@"
