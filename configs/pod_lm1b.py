"""DistillSpec's decoder pair: 234M teaches 33M on LM1B.

  python -m specdistill_jax.compile --config=configs/pod_lm1b.py    (no TPU is needed)
  python -m specdistill_jax.main --config=configs/pod_lm1b.py --workdir=gs://... \
    --config.task.data_dir=gs://...                                  (on the slice)

Zhou et al., arXiv 2310.08461, give the totals of the two GPT-like decoders and nothing else:
shapes, vocabulary of 32,000, rows of 64 tokens and 1,024 rows a step are guesses. The recipe is
that of pod_t5_xl.

Slice: v5e:4x4. Both models are small: each chip has both, and its own rows. Decoding, batch 1,
takes one chip (v5e:1x1).

Cost: roofline figures in docs/tpu_slices.md; nothing was run on a TPU.

Published: the LM1B figures could not be recovered. Ours: not run.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
  config = common.study('pod_lm1b')
  config.topology = 'v5e:4x4'
  config.task.update(name='lm1b', vocab_size=32_000, max_length=64, prompt_length=8,
                     data_dir='gs://your-bucket/tfds')
  shared = dict(norm='layer', gated_mlp=False, activation='gelu', head_dim=64, dtype='bfloat16')
  config.target.model.update(num_layers=16, width=1024, num_heads=16, num_kv_heads=16,
                             mlp_width=4096, **shared)
  config.target.update(weights_dtype='bfloat16', layout='replicated')
  config.draft.model.update(num_layers=8, width=512, num_heads=8, num_kv_heads=8,
                            mlp_width=1024, **shared)
  config.draft.layout = 'replicated'

  config.distill.rollout.max_new_tokens = 56
  config.distill.train.update(
      steps=300_000, batch_size=1024, optimizer='adafactor', learning_rate=3e-4,
      warmup_steps=5_000, schedule='plateau_cosine', weights_dtype='bfloat16', remat='full',
      head_chunk=16, log_every=100, eval_every=10_000, checkpoint_every=10_000)
  config.evaluate.update(gammas=(3, 5, 7), max_new_tokens=56, num_prompts=500,
                         topology='v5e:1x1')
  return config
