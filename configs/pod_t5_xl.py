"""DistillSpec at its own size: T5 v1.1 XL (2.8B) teaches T5 v1.1 small (77M) on XSum.

  python -m specdistill_jax.compile --config=configs/pod_t5_xl.py    (no TPU is needed)
  python -m specdistill_jax.main --config=configs/pod_t5_xl.py --workdir=gs://... \
    --config.task.data_dir=gs://... --config.task.vocabulary=gs://...  (on the slice)

Zhou et al., arXiv 2310.08461. The recipe is that of the re-implementation mjbooo/RLSD: Adafactor
at 3e-4, 300,000 steps of 32 rows, warm-up 5,000, constant until half of the steps, then a cosine
to a tenth; no dropout, no weight decay; the loss is the paper's (mean over rows of row means).
Prompts of 1,024 tokens and summaries of 64.

Slice: v5e:4x4. Teacher and student are on every chip, the frozen teacher in bfloat16: gathered
layer by layer it would take the network longer than the products take the chip. Decoding, batch
1, takes one chip (v5e:1x1): split over several, the target's steps become short and a draft
step, which is not split, as dear as a fifth of them.

Cost: roofline figures in docs/tpu_slices.md; nothing was run on a TPU.

Published (DistillSpec, Fig. 1): 10 to 46 % faster than standard speculative decoding on XSum,
GSM8K, CNN/DailyMail and WMT with this pair. Ours: not run.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
  config = common.study('pod_t5_xl')
  config.topology = 'v5e:4x4'
  config.task.update(name='xsum', vocab_size=32_128, max_length=1088,
                     data_dir='gs://your-bucket/tfds', vocabulary='gs://your-bucket/t5.model')

  config.target.model = common.t5()
  config.target.model.update(num_encoder_layers=24, num_decoder_layers=24, width=2048,
                             num_heads=32, head_dim=64, mlp_width=5120, dtype='bfloat16')
  config.target.update(weights_dtype='bfloat16', layout='replicated')
  config.draft.model = common.t5()
  config.draft.model.update(num_encoder_layers=8, num_decoder_layers=8, width=512, num_heads=6,
                            head_dim=64, mlp_width=1024, dtype='bfloat16')
  config.draft.layout = 'replicated'

  config.distill.rollout.max_new_tokens = 64
  config.distill.train.update(
      steps=300_000, batch_size=32, optimizer='adafactor', learning_rate=3e-4,
      warmup_steps=5_000, schedule='plateau_cosine', clip_norm=1.0, weights_dtype='bfloat16',
      remat='full', log_every=100, eval_every=10_000, checkpoint_every=10_000)
  config.evaluate.update(gammas=(3, 5, 7), max_new_tokens=64, num_prompts=500,
                         topology='v5e:1x1')
  return config
