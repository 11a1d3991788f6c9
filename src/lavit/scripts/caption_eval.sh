#!/usr/bin/env bash
# CIDEr of captions: --dataset coco, nocaps or flickr, with --annopath and --imagepath.
exec bash "$(dirname "${BASH_SOURCE[0]}")/evaluate.sh" --task_name caption "$@"
