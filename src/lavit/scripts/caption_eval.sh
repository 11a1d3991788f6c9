#!/bin/sh
# CIDEr of captions: --dataset coco, nocaps or flickr, with --annopath and --imagepath.
exec sh "$(dirname "$0")/evaluate.sh" --task_name caption "$@"
