#!/usr/bin/env bash
# Write sentences with a trained model; `bash scripts/text_sample.sh --help` tells how.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

COMMAND=sample
USAGE="usage: bash scripts/text_sample.sh CKPT [STEPS] [NUM_SAMPLES=10] [OUT_DIR] [BATCH_SIZE] [TOP_P] [CLAMP] \
[SEQ_LEN] [SEED] [--flag value ...]"

CKPT='' STEPS='' NUM_SAMPLES='' OUT_DIR='' BATCH_SIZE='' TOP_P='' CLAMP='' SEQ_LEN='' SEED=''
positionals CKPT STEPS NUM_SAMPLES OUT_DIR BATCH_SIZE TOP_P CLAMP SEQ_LEN SEED -- "$@"
[ -n "$CKPT" ] || fail 2 "CKPT, the weights file to sample from, is missing; $USAGE"

start --model_name_or_path "$CKPT" \
    ${STEPS:+--steps "$STEPS"} ${NUM_SAMPLES:+--num_samples "$NUM_SAMPLES"} ${OUT_DIR:+--out_dir "$OUT_DIR"} \
    ${BATCH_SIZE:+--batch_size "$BATCH_SIZE"} ${TOP_P:+--top_p "$TOP_P"} ${CLAMP:+--clamp "$CLAMP"} \
    ${SEQ_LEN:+--sequence_len "$SEQ_LEN"} ${SEED:+--seed "$SEED"} ${REST[@]+"${REST[@]}"}
