#!/usr/bin/env bash
# The tests, from nothing: makes the environment, runs pytest in two processes.
#
#   tests/run.sh [arguments of pytest]
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=../launch/environment.sh
source "$root/launch/environment.sh" "$root/tests/requirements.txt" \
  "$root/tests/requirements-optional.txt"

cd -- "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
# A file at a time: what its tests share is made once.
exec "$PYTHON" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
