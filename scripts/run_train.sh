#!/usr/bin/env bash
# Train a model; `bash scripts/run_train.sh --help` tells how.
set -euo pipefail
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

COMMAND=train
USAGE="usage: bash scripts/run_train.sh [DATASET=simple] [GPU=all] [INIT_PRETRAINED=False] \
[PRETRAINED_EMBEDDINGS=False] [FREEZE_EMBEDDINGS=False] [STEPS] [--flag value ...]"

DATASET=simple GPU=all INIT_PRETRAINED=False PRETRAINED_EMBEDDINGS=False FREEZE_EMBEDDINGS=False STEPS=
positionals DATASET GPU INIT_PRETRAINED PRETRAINED_EMBEDDINGS FREEZE_EMBEDDINGS STEPS -- "$@"
true_or_false INIT_PRETRAINED
true_or_false PRETRAINED_EMBEDDINGS
true_or_false FREEZE_EMBEDDINGS

start --dataset "$DATASET" --gpu "$GPU" \
    --init_pretrained "$INIT_PRETRAINED" --pretrained_embeddings "$PRETRAINED_EMBEDDINGS" --freeze_embeddings "$FREEZE_EMBEDDINGS" \
    ${STEPS:+--steps "$STEPS"} ${REST[@]+"${REST[@]}"}
