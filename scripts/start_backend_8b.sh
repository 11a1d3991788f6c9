#!/bin/sh
# The demo's model server for 8b on http://127.0.0.1:7890/generate.
exec bash "$(dirname "$0")/start_backend.sh" 8b "$@"
