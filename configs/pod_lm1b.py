"""DistillSpec's decoder pair: 234M teaches 33M on LM1B.

  python -m specdistill_jax.compile --config=configs/pod_lm1b.py    (no TPU is needed)
  python -m specdistill_jax.main --config=configs/pod_lm1b.py --workdir=gs://... \
    --config.bucket=gs://...     (on the slice; docs/full_scale.md)

Zhou et al., arXiv 2310.08461, give the totals of the two GPT-like decoders and nothing else:
shapes, vocabulary of 32,000, rows of 64 tokens and 1,024 rows a step are guesses. The recipe is
that of pod_t5_xl, both models trained from scratch first.

Slice: v5e:4x4. Both models are small: each chip has both, and its own rows. Decoding, batch 1,
takes one chip (v5e:1x1).

Cost: roofline figures in docs/tpu_slices.md; nothing was run on a TPU.

Published: the LM1B figures could not be recovered. Ours: not run.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
  return common.distillspec_lm1b('pod_lm1b')
