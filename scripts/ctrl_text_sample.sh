#!/usr/bin/env bash
# Write sentences that are steered; `bash scripts/ctrl_text_sample.sh --help` tells how.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

COMMAND=sample
USAGE="usage: bash scripts/ctrl_text_sample.sh CKPT [STEPS] [NUM_SAMPLES=10] [--flag value ...]"

CKPT='' STEPS='' NUM_SAMPLES=''
positionals CKPT STEPS NUM_SAMPLES -- "$@"
[ -n "$CKPT" ] || fail 2 "CKPT, the weights file to sample from, is missing; $USAGE"

start --model_name_or_path "$CKPT" \
    ${STEPS:+--steps "$STEPS"} ${NUM_SAMPLES:+--num_samples "$NUM_SAMPLES"} ${REST[@]+"${REST[@]}"}
