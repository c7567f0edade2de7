"""The first pair of speculative decoding: T5 v1.1 XXL (11B) and T5 v1.1 small, English to German.

  python -m specdistill_jax.compile --config=configs/pod_t5_xxl.py    (no TPU is needed)
  python -m specdistill_jax.main --config=configs/pod_t5_xxl.py --workdir=gs://... \
    --config.bucket=gs://...     (on the slice; docs/full_scale.md)

The pair of Leviathan et al. 2023 (arXiv 2211.17192), distilled with the recipe of pod_t5_xl but
128 rows a step, short as they are; prompts and translations of 80 tokens.

Slice: v4:2x2x4. Teacher and student are on every chip, the teacher in bfloat16. Rows are so short
that a teacher split over the chips and gathered layer by layer would take the network longer than
the products take the chip. Decoding, batch 1, takes one chip (v4:1x1x1).

Cost: roofline figures in docs/tpu_slices.md; nothing was run on a TPU.

Published (Leviathan et al., Tables 2 and 4; TPU v4, batch 1, undistilled draft): at temperature 0
and gamma 7 alpha 0.75, c 0.02, 3.4 times as fast (3.2 predicted); at temperature 1 and gamma 7
alpha 0.62, 2.6 times (2.3 predicted). Ours: not run.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
  config = common.distillspec_t5('pod_t5_xxl', 'wmt14_en_de', target='xxl')
  config.distill.train.batch_size = 128
  return config
