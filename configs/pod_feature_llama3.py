"""FSPAD and EAGLE-3 drafts of Llama 3 Instruct 8B and 70B on conversations, at the papers' sizes.

  python -m specdistill_jax.compile --config=configs/pod_feature_llama3.py:70b-fspad
  python -m specdistill_jax.compile --config=configs/pod_feature_llama3.py:8b-eagle3 \
    --programs=speculate --tree='dynamic k10 d8 n59'
  python -m specdistill_jax.main --config=configs/pod_feature_llama3.py:8b-fspad \
    --workdir=gs://... --config.bucket=gs://...     (docs/full_scale.md)

As configs/pod_feature_vicuna.py, at a vocabulary of 128,256: the logits of 16 rows of 2,048 tokens
would take 17 GB in float32 for each model, so that heads and losses run on 256 positions of a row
at a time (`head_chunk`). EAGLE-3 has a head of its own, over the 32,000 tokens that occur most
often in the training data. FSPAD's draft of the 8B is, as released, 11,008 wide in its MLP and has
32 key heads: more than the target's own layers.

The templates are Llama 3's own; the papers' code adds LLaMA-2's long system prompt and a space
before each answer, and EAGLE-3 was tested on Llama 3.1 and 3.3.

Slices. 8B: v5e:2x4, spread over the 8 chips, two rows on each; decoding, batch 1, splits it by
heads over v5e:2x2. 70B: v5e:4x8, the width over 16 chips, heads, MLP and vocabulary over 2;
decoding over the 4 chips of v5p:2x2x1, one host's, two key heads on each.

Cost: roofline figures in docs/tpu_slices.md; nothing was run on a TPU.

Published: see configs/fspad_spec_bench.py. Ours: not run.
"""

import ml_collections

from configs import common

SIZES = ('8b', '70b')
DRAFTS = ('eagle', 'fspad', 'eagle3')


def get_config(arg: str = '8b-fspad') -> ml_collections.ConfigDict:
  size, _, draft = arg.partition('-')
  if size not in SIZES or draft not in DRAFTS:
    raise ValueError(f'pod_feature_llama3 runs {" or ".join(SIZES)}, a hyphen, and '
                     f'{", ".join(DRAFTS)}, not {arg!r}')
  return common.feature_pod(f'pod_feature_llama3_{size}_{draft}', f'llama3_{size}', draft)
