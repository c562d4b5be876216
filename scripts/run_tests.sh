#!/usr/bin/env bash
# Every check, the same here as in CI: bash scripts/run_tests.sh [argument of pytest ...]
# Paths among the arguments count from the repository root.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

stage() { # stage COMMAND ...: runs a module of Python in the repository root
    echo "== $*"
    (cd "$ROOT" && "$PYTHON" -m "$@") || fail $? "$1 failed, after $SECONDS seconds in all"
}

ensure_env dev
stage ruff check
stage ruff format --check
stage mypy
stage pytest "$@"
echo "== all checks passed in $SECONDS seconds"
