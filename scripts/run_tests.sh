#!/usr/bin/env bash
# Every check, the same here as in CI: bash scripts/run_tests.sh [argument of pytest ...]
# Paths among the arguments count from the repository root; -n 0 runs the tests in one process.
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
stage pytest -n 2 --dist loadfile "$@"
echo "== all checks passed in $SECONDS seconds"
