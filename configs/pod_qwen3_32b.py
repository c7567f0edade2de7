"""A large decoder pair: Qwen3 32B teaches Qwen3 0.6B on conversations.

  python -m specdistill_jax.compile --config=configs/pod_qwen3_32b.py    (no TPU is needed)
  python -m specdistill_jax.main --config=configs/pod_qwen3_32b.py --workdir=gs://... \
    --config.bucket=gs://...     (docs/full_scale.md)

As pod_llama3_70b, on v4: 16 chips with twice the memory hold a teacher of half the size.
Settings are ours: no paper distils this pair.

Slice: v4:2x2x4. Both models lie over all 16 chips, the teacher in bfloat16: heads, MLP and
vocabulary over 4 (tensor), the width over 4, from which they are gathered layer by layer. Decoding,
batch 1, is the work of one host and splits both models over the 4 chips of v4:2x2x1.

Cost: roofline figures in docs/tpu_slices.md; nothing was run on a TPU.

Published: none for this pair. Ours: not run.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
  config = common.study('pod_qwen3_32b')
  config.topology = 'v4:2x2x4'
  config.mesh.update(data=1, fsdp=-1, tensor=4)
  config.task.update(name='conversations', vocab_size=151_936, max_length=1024, max_inputs=768,
                     chat_template='qwen', train_files=('{bucket}/chats.jsonl',))
  config.target.init_from = '{bucket}/models/qwen3_32b'
  config.draft.init_from = '{bucket}/models/qwen3_0_6b'
  for section in (config.target, config.draft):
    section.train.update(steps=0, batch_size=32)

  shared = dict(head_dim=128, num_kv_heads=8, rope_theta=1e6, qk_norm=True, dtype='bfloat16')
  config.target.model.update(num_layers=64, width=5120, num_heads=64, mlp_width=25_600,
                             tie_embeddings=False, **shared)
  config.target.weights_dtype = 'bfloat16'
  config.draft.model.update(num_layers=28, width=1024, num_heads=16, mlp_width=3072,
                            tie_embeddings=True, **shared)

  config.distill.rollout.max_new_tokens = 256
  config.distill.train.update(
      steps=10_000, batch_size=32, learning_rate=1e-4, warmup_steps=500,
      weights_dtype='bfloat16', remat='full', head_chunk=256, eval_every=1_000,
      checkpoint_every=1_000)
  config.evaluate.update(gammas=(3, 5), max_new_tokens=256, num_prompts=80,
                         topology='v4:2x2x1', weights_dtype='bfloat16')
  config.evaluate.mesh.tensor = -1
  return config
