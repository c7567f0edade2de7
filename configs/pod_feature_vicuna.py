"""FSPAD and EAGLE-3 drafts of Vicuna 7B and 33B on conversations, at the papers' sizes.

  python -m specdistill_jax.compile --config=configs/pod_feature_vicuna.py:33b-fspad
  python -m specdistill_jax.compile --config=configs/pod_feature_vicuna.py:7b-eagle3 \
    --programs=speculate --tree='dynamic k10 d8 n59'
  python -m specdistill_jax.main --config=configs/pod_feature_vicuna.py:7b-fspad \
    --workdir=gs://... --config.bucket=gs://...     (docs/full_scale.md)

The argument is a size and a draft: `7b` or `33b`, and `fspad`, `eagle` or `eagle3`.

FSPAD with the settings of its official code (arXiv 2408.15562; Luc4Gui/FSPAD): 64,600 ShareGPT
conversations, rows of 2,048 tokens, 16 of them a step, 21 epochs; AdamW (0.9, 0.95) at 5e-5, 2,000
warm-up steps, a decay to 0 at step 800,000, which training never reaches (once a step: with several
processes that code may go down it faster); each value of a gradient clipped at 0.5. The target's
features are computed in the step: a cache of them would take terabytes. The file in the bucket is
yours to choose: the code takes the first 68,000 conversations after a shuffle and holds 5 % of them
out. EAGLE-3 (2503.01840) as its authors' code does on far more data: 7 unrolled steps, 12,000 of
warm-up, all 800,000 steps, the norm of a gradient clipped at 0.5, but 16 rows a step as FSPAD; its
paper has no draft of these two targets; on answers of the target
(`--config.distill.data_source=target`), if as in its paper.

Decoding is tested on 480 held-out conversations, as many as Spec-Bench has questions, up to 512
new tokens, at temperatures 0 and 1, with EAGLE-2's dynamic tree: 10 nodes a level, 6 levels
(EAGLE-3: 8), 59 verified beside the root (33B: 47).

Slices. 7B: v5e:2x2, the frozen target in bfloat16 and the draft's state both spread over the 4
chips (fsdp); decoding, batch 1, on the same chips, split by heads. 33B: v5e:4x4, a row a chip;
its 52 heads make tensor = 4 the widest split, so that it decodes on the 4 chips of v4:2x2x1, of
twice the memory.

Cost: roofline figures in docs/tpu_slices.md; nothing was run on a TPU.

Published: see configs/fspad_spec_bench.py. Ours: not run.
"""

import ml_collections

from configs import common

SIZES = ('7b', '33b')
DRAFTS = ('eagle', 'fspad', 'eagle3')


def get_config(arg: str = '7b-fspad') -> ml_collections.ConfigDict:
  size, _, draft = arg.partition('-')
  if size not in SIZES or draft not in DRAFTS:
    raise ValueError(f'pod_feature_vicuna runs {" or ".join(SIZES)}, a hyphen, and '
                     f'{", ".join(DRAFTS)}, not {arg!r}')
  return common.feature_pod(f'pod_feature_vicuna_{size}_{draft}', f'vicuna_{size}', draft)
