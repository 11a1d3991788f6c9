#!/bin/sh
# Accuracy of answers: VQAv2, or --dataset okvqa, gqa or vizwiz. The data is in the original's places below data/, or where
# --annopath and --imagepath say.
exec sh "$(dirname "$0")/evaluate.sh" --task_name vqa "$@"
