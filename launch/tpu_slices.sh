#!/usr/bin/env bash
# docs/tpu_slices.md: what each pod config needs on its slice, from the TPU compiler, without a TPU.
#
#   PYTHON=.venv/bin/python launch/tpu_slices.sh [flags of specdistill_jax.compile]
#
# Needs launch/requirements-tpu-compile.txt. A program takes a minute or more to compile; --keep=DIR
# keeps what is finished, so that a second run goes on.
set -euo pipefail

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
page="$root/docs/tpu_slices.md"
draft="$(mktemp)"

cat > "$draft" <<'TEXT'
# TPU slices

Made by `launch/tpu_slices.sh`. Memory is the TPU compiler's own figure for one chip. Times are
rooflines from published rates, lower bounds, and were measured nowhere: the longer of all kernels
one after the other (each the longer of its matrix products at peak and its HBM bytes at full
bandwidth) and all collectives one after the other on one torus axis. MFU counts the products that
the program needs, nothing that is computed twice. FLOPs, HBM and ICI bytes are of one chip and
one step, in decoding of one turn of the loop, in which nothing is taken to overlap.

TEXT
for config in "$root"/configs/pod_*.py; do
  "${PYTHON:-python}" -P -m specdistill_jax.compile "--config=$config" "$@" \
    | sed '$d' >> "$draft"
  echo >> "$draft"
done
mv -- "$draft" "$page"
chmod 644 "$page"
