#!/bin/sh
# Everything that tokenizer training needs: the repository's own install with LAVIS (salesforce-lavis 1.0.2 without its
# 2023 pins) and the training extras. Further arguments go to ../install.sh (try --help).
set -eu
exec bash "$(dirname "$0")/../install.sh" --extras train --lavis "$@"
