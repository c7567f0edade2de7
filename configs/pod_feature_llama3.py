"""FSPAD and EAGLE-3 drafts of Llama 3 Instruct 8B and 70B on conversations, at the papers' sizes.

  python -m specdistill_jax.compile --config=configs/pod_feature_llama3.py:70b-fspad
  python -m specdistill_jax.compile --config=configs/pod_feature_llama3.py:8b-eagle3 \
    --programs=speculate --tree='dynamic k10 d8 n59'
  python -m specdistill_jax.main --config=configs/pod_feature_llama3.py:8b-fspad \
    --workdir=gs://... --config.target.init_from=gs://...

As configs/pod_feature_vicuna.py, at a vocabulary of 128,256: the logits of 16 rows of 2,048 tokens
would take 17 GB in float32 for each model, so that heads and losses run on 256 positions of a row
at a time (`head_chunk`). EAGLE-3 has a head of its own, over the 32,000 tokens that occur most
often in the training data. FSPAD's draft of the 8B is, as released, 11,008 wide in its MLP and has
32 key heads: more than the target's own layers.

Slices. 8B: v5e:2x4, spread over the 8 chips, two rows on each; decoding, batch 1, splits it by
heads over v5e:2x2. 70B: v5e:4x8, the width over 16 chips, heads, MLP and vocabulary over 2;
decoding over the 8 chips of v4:2x2x2, a key head on each.

Cost: roofline figures in docs/tpu_slices.md, if they are there; nothing was run on a TPU.

Published: see configs/feature_drafts.py. Ours: not run.
"""

import ml_collections

from configs import common

SIZES = {
    '8b': dict(num_layers=32, width=4096, num_heads=32, mlp_width=14_336),
    '70b': dict(num_layers=80, width=8192, num_heads=64, mlp_width=28_672),
}
# Topology of training, its tensor axis, topology of decoding, nodes of the dynamic tree.
SLICES = {'8b': ('v5e:2x4', 1, 'v5e:2x2', 59), '70b': ('v5e:4x8', 2, 'v4:2x2x2', 47)}
# EAGLE-1's drafts of Llama 3 have no bias; EAGLE-3 drafts up to 8 levels.
DRAFTS = {'eagle': dict(fusion_bias=False), 'fspad': {}, 'eagle3': {}}


def get_config(arg: str = '8b-fspad') -> ml_collections.ConfigDict:
  size, _, draft = arg.partition('-')
  if size not in SIZES or draft not in DRAFTS:
    raise ValueError(f'pod_feature_llama3 runs {" or ".join(SIZES)}, a hyphen, and '
                     f'{", ".join(DRAFTS)}, not {arg!r}')
  training, tensor, decoding, nodes = SLICES[size]
  config = common.study(f'pod_feature_llama3_{size}_{draft}')
  config.topology = training
  config.mesh.update(data=1, fsdp=-1, tensor=tensor)
  config.task.update(name='conversations', vocab_size=128_256, max_length=2048,
                     chat_template='llama-3', train_files=('gs://your-bucket/sharegpt.jsonl',),
                     vocabulary='gs://your-bucket/llama3.model')
  config.target.model.update(
      dict(num_kv_heads=8, head_dim=128, norm_eps=1e-5, rope_theta=500_000.0,
           tie_embeddings=False, dtype='bfloat16') | SIZES[size])
  config.target.weights_dtype = 'bfloat16'
  config.target.train.batch_size = 16  # only trained here if nothing is imported
  config.draft.model = common.feature_draft(draft)
  config.draft.model.update(DRAFTS[draft])
  if (size, draft) == ('8b', 'fspad'):
    config.draft.model.update(num_kv_heads=32, mlp_width=11_008)
  config.draft.train.update(steps=0, batch_size=16)

  config.distill.update(objective='feature', data_source='fixed', control=False, seeds=(0,))
  config.distill.rollout.max_new_tokens = 512
  config.distill.train.update(common.feature_recipe(draft), head_chunk=256)
  depth = 8 if draft == 'eagle3' else 6
  config.evaluate.update(gammas=(5,), trees=('eagle1', f'dynamic k10 d{depth} n{nodes}'),
                         max_new_tokens=512, num_prompts=480, topology=decoding)
  config.evaluate.mesh.tensor = -1
  return config
