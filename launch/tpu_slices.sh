#!/usr/bin/env bash
# What each pod config needs on its slice, from the TPU compiler, without a TPU: docs/tpu_slices.md,
# and the table between the marks `tpu_slices` in README.md.
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

studies=(pod_llama3_70b pod_lm1b pod_qwen3_32b pod_t5_xl pod_t5_xxl
         pod_feature_vicuna:{7b,33b}-{fspad,eagle3} pod_feature_llama3:{8b,70b}-{fspad,eagle3})

# Of the papers' tables at full scale what no study above has: a training and a decoding program.
tables=(distillspec_speedup:{gsm8k,wmt14_en_de,cnn_dailymail}'=on_policy,speculate'
        distillspec_transfer:bbh'=speculate'
        distillspec_transfer:xxl'=target,speculate'
        distillspec_garden:distil_small'=on_policy,speculate'
        distillspec_garden:distil_{base,large,xl}'=on_policy'
        distillspec_garden:served_{base,large,xl}'=on_policy,speculate'
        fspad_spec_bench:{vicuna_7b,vicuna_33b,llama3_8b,llama3_70b}_eagle'=train,speculate'
        fspad_ablation:no_{sampling,alignment}'=train,speculate'
        lk_table1:{eagle3,mlp}'=train,speculate'
        lk_table1:medusa'=train,held_out,samples,speculate'
        lk_table2:llama3_70b_eagle3'=train,samples,speculate')

# The tables of a study, CONFIG or CONFIG:ARGUMENT; the last line, a JSON document, goes to
# $draft.documents.
compiled() {
  local status=0 config="${1%%:*}.py"
  if [[ $1 == *:* ]]; then
    config+=":${1#*:}"
  fi
  printf '\n\140python -m specdistill_jax.compile --config=configs/%s%s\140\n\n' "$config" \
    "${2:+ ${*:2}}" >> "$draft"  # \140: a backquote
  "${PYTHON:-python}" -P -m specdistill_jax.compile "--config=$root/configs/$config" "${@:2}" \
    ${flags[@]+"${flags[@]}"} > "$draft.tables" || status=$?
  if [[ $status -gt 1 ]]; then  # 1: something does not fit, and the table says what
    exit "$status"
  fi
  sed '$d' "$draft.tables" >> "$draft"
  sed -n '$p' "$draft.tables" >> "$draft.documents"
  rm -- "$draft.tables"
}

cat > "$draft" <<'TEXT'
# TPU slices

Made by `launch/tpu_slices.sh`, from the TPU compiler; nothing was run on a TPU.

**Programs.** `target`, `train` and `on_policy` are updates; `held_out` decodes held-out prompts and
`samples` draws stored answers beside what training holds; the others decode. A section without rows
of `target`, `held_out` or `samples` was compiled before these were programs: that they fit there is
not known. Of a study of the papers' tables the largest program in training and in decoding is here.

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
for study in "${studies[@]}"; do
  printf '\n## %s\n' "$study" >> "$draft"
  compiled "$study"
  if [[ $study == pod_feature_* ]]; then
    compiled "$study" --programs=speculate --tree=own
  fi
done
"${PYTHON:-python}" -P - "$draft.documents" "$root/README.md" <<'SUMMARY'
import json
import pathlib
import re
import sys

from specdistill_jax.costs import report

lines, readme = map(pathlib.Path, sys.argv[1:])
documents = [document for line in lines.read_text().splitlines()
             for document in json.loads(line)['documents']]
mark = '<!-- tpu_slices -->'
made = f'{mark}\n{report.summary(documents)}\n{mark}'
readme.write_text(re.sub(f'{mark}.*{mark}', lambda _: made, readme.read_text(), flags=re.DOTALL))
SUMMARY

for study in "${tables[@]}"; do
  printf '\n## %s\n' "${study%=*}" >> "$draft"
  compiled "${study%=*}" "--programs=${study#*=}"
done

printf '\n## Growth: as many rows a chip on more chips\n' >> "$draft"
compiled pod_t5_xl --programs=train --topology=v5e:4x4,v5e:8x8,v5e:16x16 --grow
compiled pod_lm1b --programs=train,on_policy --topology=v5e:4x4,v5e:16x16 --grow

printf '\n## The smallest slice\n' >> "$draft"
compiled pod_t5_xl --topology=v5e --programs=train,generate --sweep
compiled pod_llama3_70b --topology=v5e --programs=train --sweep
mv -- "$draft" "$page"
chmod 644 "$page"
