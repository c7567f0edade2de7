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
flags=("$@")

# The command's tables, without its last line, which is the JSON document.
compiled() {
  local status=0
  printf '\n`python -m specdistill_jax.compile --config=configs/%s.py%s`\n\n' "$1" \
    "${2:+ ${*:2}}" >> "$draft"
  "${PYTHON:-python}" -P -m specdistill_jax.compile "--config=$root/configs/$1.py" "${@:2}" \
    ${flags[@]+"${flags[@]}"} > "$draft.tables" || status=$?
  if [[ $status -gt 1 ]]; then  # 1: something does not fit, and the table says what
    exit "$status"
  fi
  sed '$d' "$draft.tables" >> "$draft"
  rm -- "$draft.tables"
}

cat > "$draft" <<'TEXT'
# TPU slices

Made by `launch/tpu_slices.sh`, from the TPU compiler; nothing was run on a TPU.

**Memory** is the compiler's own figure for one chip: arguments, outputs that reuse none of them,
temporaries and code. FLOPs, HBM and ICI bytes and collectives are of one chip, loops as often as
they run: in training of one step, in decoding of one turn of the loop (a token of `generate` and
`draft`, a cycle of `speculate`).

**Times** are rooflines from published rates: lower bounds, measured nowhere. A kernel takes the
longest of its matrix products at peak, its HBM bytes and its on-chip bytes at full bandwidth, and
kernels run one after the other. Collectives run one after the other, at the bandwidth of one torus
axis, both ways. A training step takes the longer of the two sums, in a decoding turn they add up.
MFU counts the products that the program needs, nothing that is computed twice.

**Left out**, so that a chip can only be slower: latencies (a collective's, some microseconds,
is as long as a small layer: multiply by the column `collectives`; a kernel's start), padding to
the hardware's tiles, work of the vector unit (softmax, norms, sampling), prefetches that come too
late, slices without wrap-around links, the host and its data. On the other side, kernels and
prefetches that overlap are counted one after the other, and rings take one torus axis, not all.

**Predictions** are those of the reports, speed-up = tau / (gamma c + v), from the turns of
`generate`, `draft` and `speculate` at batch 1: c is a draft step, v what a cycle takes beyond gamma
draft steps, both in target steps. v falls below 1 where the compiler keeps a small draft in the
chip's own memory for a whole cycle: its weights then cross from HBM once, not gamma times. tau
follows from alpha as if every token were accepted independently. A draft step is the shortest
program here, so latencies lengthen it most, and c on a chip is larger: for the pair of pod_t5_xxl
Leviathan et al. (arXiv 2211.17192) measured 0.02 on a v4, and a speed-up of 3.4 at temperature 0
(alpha 0.75, gamma 7).
TEXT
for config in "$root"/configs/pod_*.py; do
  name="$(basename -- "$config" .py)"
  printf '\n## %s\n' "$name" >> "$draft"
  compiled "$name"
done

printf '\n## Growth: as many rows a chip on more chips\n' >> "$draft"
compiled pod_t5_xl --programs=train --topology=v5e:4x4,v5e:8x8,v5e:16x16 --grow
compiled pod_lm1b --programs=train,on_policy --topology=v5e:4x4,v5e:16x16 --grow

printf '\n## The smallest slice\n' >> "$draft"
compiled pod_t5_xl --topology=v5e --programs=train,generate --sweep
compiled pod_llama3_70b --topology=v5e --programs=train --sweep
mv -- "$draft" "$page"
chmod 644 "$page"
