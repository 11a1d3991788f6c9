#!/usr/bin/env bash
# The demo's web page for nano on http://127.0.0.1:7860; start its backend first.
exec bash "$(dirname "${BASH_SOURCE[0]}")/start_frontend.sh" nano "$@"
