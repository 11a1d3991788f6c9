#!/bin/sh
# Accuracy of answers: VQAv2, or --dataset okvqa, gqa or vizwiz; data in the original's places below data/, or --annopath and --imagepath.
exec sh "$(dirname "$0")/evaluate.sh" --task_name vqa "$@"
