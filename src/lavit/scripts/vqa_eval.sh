#!/usr/bin/env bash
# Accuracy of answers: --dataset vqav2, okvqa, gqa or vizwiz, with --annopath and --imagepath.
exec bash "$(dirname "${BASH_SOURCE[0]}")/evaluate.sh" --task_name vqa "$@"
