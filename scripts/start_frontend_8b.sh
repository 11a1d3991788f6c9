#!/bin/sh
# The demo's web page for 8b on http://127.0.0.1:7860; start its backend first.
exec bash "$(dirname "$0")/start_frontend.sh" seed-llama-8b "$@"
