#!/usr/bin/env bash
# The whole test suite, offline after the installation, in two processes; arguments go to pytest:
#   bash scripts/test.sh [-m "not slow"] [-k NAME] ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" dev
ruff check .
ruff format --check .
pyright
# In the order of their names: reordered, the file with the longest tests would run last and alone.
exec pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
