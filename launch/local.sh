#!/usr/bin/env bash
# One study on this machine, from nothing: makes the environment, runs all stages, prints the
# result table and the wall time, writes the report.
#
#   launch/local.sh configs/quickstart.py[:argument] [--workdir=W] [flags of specdistill_jax.main]
#
# The workdir is runs/<name of the config> unless given. Run again, it goes on where it stopped.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
started=$SECONDS

if [ "$#" -lt 1 ] || [ "${1#-}" != "$1" ]; then
  echo "usage: ${BASH_SOURCE[0]} configs/quickstart.py[:argument] [--workdir=W] [flags of main]" >&2
  exit 2
fi
config="$1"
shift
file="${config%%:*}"
argument="${config#"$file"}"
# A relative path is tried from here first, then from the repository.
if [ ! -e "$file" ] && [ -e "$root/$file" ]; then file="$root/$file"; fi

workdir=()
case " $* " in
  *' --workdir'*) ;;
  *)
    name="$(basename -- "$file" .py)${argument//[^A-Za-z0-9_.=,-]/-}"
    workdir=("--workdir=$root/runs/$name") ;;
esac

# shellcheck source=environment.sh
source "$root/launch/environment.sh" "$root/requirements.txt"

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
# Compiled programs are kept for the next run. JAX chooses the accelerator unless told otherwise.
cache="${XDG_CACHE_HOME:-$HOME/.cache}/specdistill_jax/xla"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$cache}"

status=0
# -P: a folder called configs or specdistill_jax where the user stands must not be imported.
"$PYTHON" -P -m specdistill_jax.main "--config=$file$argument" ${workdir[@]+"${workdir[@]}"} "$@" \
    || status=$?
echo "[local.sh] wall time, environment included: $((SECONDS - started)) s"
exit "$status"
