#!/usr/bin/env bash
# Set up .venv now, if the running Python lacks the requirements: bash scripts/setup.sh [dev]
# The other scripts do that by themselves; `dev` adds what scripts/run_tests.sh needs.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

case $#${1-} in
    0 | 1dev) ensure_env "$@" ;;
    *) fail 2 "the only argument is dev, found '$*'; usage: bash scripts/setup.sh [dev]" ;;
esac
echo "ready: $PYTHON"
