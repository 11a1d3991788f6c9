#!/bin/sh
# Accuracy of answers: --dataset vqav2, okvqa, gqa or vizwiz, with --annopath and --imagepath.
exec sh "$(dirname "$0")/evaluate.sh" --task_name vqa "$@"
