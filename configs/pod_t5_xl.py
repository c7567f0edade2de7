"""DistillSpec at its own size: T5 v1.1 XL (2.8B) teaches T5 v1.1 small (77M) on XSum.

  python -m specdistill_jax.compile --config=configs/pod_t5_xl.py    (no TPU is needed)
  python -m specdistill_jax.main --config=configs/pod_t5_xl.py --workdir=gs://... \
    --config.bucket=gs://...     (on the slice; docs/full_scale.md)

Zhou et al., arXiv 2310.08461. The recipe is that of the re-implementation mjbooo/RLSD: both models
start from T5 v1.1 adapted to language modelling and are fine-tuned for 100,000 steps, then the
draft is distilled for 300,000; Adafactor at 3e-4, 32 rows a step, warm-up over a sixtieth of the
steps, constant until half of them, then a cosine to a tenth; no dropout, weight decay or clipping.
The loss is the paper's (mean over rows of row means). Rollouts are of the draft's whole law: that
code leaves its library's top-k of 50 in place. Prompts of 1,024 tokens and summaries of 64.

Slice: v5e:4x4. The target is fine-tuned spread over the chips. In distillation teacher and student
are on every chip, the frozen teacher in bfloat16: gathered
layer by layer it would take the network longer than the products take the chip. Decoding, batch
1, takes one chip (v5e:1x1): split over several, the target's steps become short and a draft
step, which is not split, as dear as a fifth of them.

Cost: roofline figures in docs/tpu_slices.md; nothing was run on a TPU.

Published (DistillSpec, Fig. 1): 10 to 45 % faster than standard speculative decoding on XSum,
GSM8K, CNN/DailyMail and WMT with this pair. Ours: not run.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
  return common.distillspec_t5('pod_t5_xl', 'xsum')
