#!/usr/bin/env bash
# From captions to a vision tower: finetune-llm, extract-embeddings, train-clip, export, retrieval report.
#   bash scripts/train_llm2clip.sh [CONFIG] [--arms NAME,...] [--seeds N,...] [--root DIR] [--launcher COMMAND]
#                              [--STAGE.section.field VALUE ...]
# Without CONFIG the demo: real drawings and captions, a real LLM, two CPU cores.
# A killed run continues where it stopped; a finished one is recognised.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" demo
config=configs/demo/llm2clip.yaml
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then config=$1; shift; fi
exec python scripts/run_chain.py "$config" "$@"
