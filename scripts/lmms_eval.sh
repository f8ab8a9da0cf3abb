#!/usr/bin/env bash
# lmms-eval suites for every model of the config, and a comparison with the baseline: which tower is better?
#   bash scripts/lmms_eval.sh [CONFIG] [--arms NAME,...] [--seeds N,...] [--root DIR] [--STAGE.section.field VALUE ...]
# CONFIG may be any chain of evaluations. Without it the demo, with the models that scripts/llava_finetune.sh made.
# A killed run continues where it stopped, response by response; a finished one is recognised.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" eval
config=configs/demo/lmms.yaml
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then config=$1; shift; fi
exec python scripts/run_chain.py "$config" "$@"
