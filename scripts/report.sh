#!/usr/bin/env bash
# Write a page about a run, or about several side by side; `bash scripts/report.sh --help` tells how.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

COMMAND=report
USAGE="usage: bash scripts/report.sh RUN [RUN ...] [--flag value ...]"

help_if_asked "$@"
[ -n "${1-}" ] && [ "${1#--}" = "$1" ] || fail 2 "RUN, a run's folder or a weights file, is missing; $USAGE"

start "$@"
