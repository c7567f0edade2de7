"""A large decoder pair: Llama 3.1 70B teaches Llama 3.2 1B on conversations.

  python -m specdistill_jax.compile --config=configs/pod_llama3_70b.py    (no TPU is needed)
  python -m specdistill_jax.main --config=configs/pod_llama3_70b.py --workdir=gs://... \
    --config.bucket=gs://...     (docs/full_scale.md)

DistillSpec's on-policy loss on the models that people serve, both as released (instruct). Rows of
1,024 tokens, of which the draft writes up to 256 in a rollout. Settings are ours: no paper distils
this pair.

Slice: v5e:8x8. Both models lie over all 64 chips, the teacher in bfloat16: heads, MLP and
vocabulary over 4 (tensor), the width over 16, from which they are gathered layer by layer. Over
64 (and tensor=1) the network would carry 2.6 times as much and a rollout read four times as much:
an on-policy step of 1.7 s in place of 1.2 s. Decoding, batch 1, is the work of one host and splits
both models over the 4 chips of v5p:2x2x1, two key heads on each. Held-out figures while it learns
are of both laws on held-out rows: nothing is decoded, for which the teacher would be gathered.
Prompts have at most 768 tokens, so that a row with its rollout has 1,024.

Cost: roofline figures in docs/tpu_slices.md; nothing was run on a TPU.

Published: none for this pair. Ours: not run.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
  config = common.study('pod_llama3_70b')
  config.topology = 'v5e:8x8'
  config.mesh.update(data=1, fsdp=-1, tensor=4)
  config.task.update(name='conversations', vocab_size=128_256, max_length=1024, max_inputs=768,
                     chat_template='llama-3', train_files=('{bucket}/chats.jsonl',))
  config.target.init_from = '{bucket}/models/llama3_1_70b'
  config.draft.init_from = '{bucket}/models/llama3_2_1b'
  for section in (config.target, config.draft):
    section.train.update(steps=0, batch_size=64)

  shared = dict(head_dim=128, num_kv_heads=8, norm_eps=1e-5, rope_theta=500_000.0,
                rope_scaling='llama3', dtype='bfloat16')
  config.target.model.update(num_layers=80, width=8192, num_heads=64, mlp_width=28_672,
                             rope_factor=8.0, tie_embeddings=False, **shared)
  config.target.weights_dtype = 'bfloat16'
  config.draft.model.update(shared | dict(
      num_layers=16, width=2048, num_heads=32, head_dim=64, mlp_width=8192, rope_factor=32.0,
      tie_embeddings=True))

  config.distill.rollout.max_new_tokens = 256
  # Decoding beside training would gather the teacher: 35 GB a chip.
  config.distill.rollout.tensor = 0
  config.distill.train.update(
      steps=10_000, batch_size=64, learning_rate=1e-4, warmup_steps=500,
      weights_dtype='bfloat16', remat='full', head_chunk=512, eval_every=1_000,
      checkpoint_every=1_000)
  config.evaluate.update(gammas=(3, 5), max_new_tokens=256, num_prompts=80,
                         topology='v5p:2x2x1', weights_dtype='bfloat16')
  config.evaluate.mesh.tensor = -1
  return config
