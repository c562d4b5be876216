#!/usr/bin/env bash
# Measure samples beside real text; `bash scripts/evaluate.sh --help` tells how.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

COMMAND=evaluate
USAGE="usage: bash scripts/evaluate.sh SAMPLES --reference FILE [--flag value ...]"

SAMPLES=''
positionals SAMPLES -- "$@"
[ -n "$SAMPLES" ] || fail 2 "SAMPLES, the text to judge, is missing; $USAGE"

start "$SAMPLES" ${REST[@]+"${REST[@]}"}
