"""The first pair of speculative decoding: T5 v1.1 XXL (11B) and T5 v1.1 small, English to German.

  python -m specdistill_jax.compile --config=configs/pod_t5_xxl.py    (no TPU is needed)
  python -m specdistill_jax.main --config=configs/pod_t5_xxl.py --workdir=gs://... \
    --config.task.data_dir=gs://... --config.task.vocabulary=gs://...   (on the slice)

The pair of Leviathan et al. 2023 (arXiv 2211.17192), distilled with the recipe of pod_t5_xl;
prompts and translations of 80 tokens.

Slice: v4:2x2x4. Teacher and student are on every chip, the teacher in bfloat16. Rows are so short
that a teacher split over the chips and gathered layer by layer would take the network longer than
the products take the chip. Decoding, batch 1, takes one chip (v4:1x1x1), as published.

Cost: roofline figures in docs/tpu_slices.md; nothing was run on a TPU.

Published (Leviathan et al., Tables 2 and 4; TPU v4, batch 1, undistilled draft): at temperature 0
and gamma 7 alpha 0.75, c 0.02, 3.4 times as fast (3.2 predicted); at temperature 1 and gamma 7
alpha 0.62, 2.6 times (2.3 predicted). Ours: not run.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
  config = common.study('pod_t5_xxl')
  config.topology = 'v4:2x2x4'
  config.task.update(name='wmt14_en_de', vocab_size=32_128, max_length=160,
                     data_dir='gs://your-bucket/tfds', vocabulary='gs://your-bucket/t5.model')

  config.target.model = common.t5()
  config.target.model.update(num_encoder_layers=24, num_decoder_layers=24, width=4096,
                             num_heads=64, head_dim=64, mlp_width=10_240, dtype='bfloat16')
  config.target.update(weights_dtype='bfloat16', layout='replicated')
  config.draft.model = common.t5()
  config.draft.model.update(num_encoder_layers=8, num_decoder_layers=8, width=512, num_heads=6,
                            head_dim=64, mlp_width=1024, dtype='bfloat16')
  config.draft.layout = 'replicated'

  config.distill.rollout.max_new_tokens = 80
  config.distill.train.update(
      steps=300_000, batch_size=128, optimizer='adafactor', learning_rate=3e-4,
      warmup_steps=5_000, schedule='plateau_cosine', weights_dtype='bfloat16', remat='full',
      log_every=100, eval_every=10_000, checkpoint_every=10_000)
  config.evaluate.update(gammas=(3, 5, 7), max_new_tokens=80, num_prompts=500,
                         topology='v4:1x1x1')
  return config
