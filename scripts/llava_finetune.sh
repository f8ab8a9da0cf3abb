#!/usr/bin/env bash
# LLaVA-1.5's two stages for every tower of the config, under one recipe: pretrain, finetune, export, answers, report.
#   bash scripts/llava_finetune.sh [CONFIG] [--arms NAME,...] [--seeds N,...] [--root DIR] [--launcher COMMAND]
#                              [--STAGE.section.field VALUE ...]
# Without CONFIG the demo, with the towers that scripts/train_llm2clip.sh made.
# A killed run continues where it stopped; a finished one is recognised.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" demo
config=configs/demo/llava.yaml
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then config=$1; shift; fi
exec python scripts/run_chain.py "$config" "$@"
