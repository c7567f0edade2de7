"""Feature-level drafts against a standalone one: EAGLE-1, FSPAD with its ablations, EAGLE-3.

  python -m specdistill_jax.main --config=configs/feature_drafts.py:fspad --workdir=W/fspad

One study a draft, the argument naming it: `standalone` (DistillSpec, forward KL on its own
samples), `eagle`, `fspad`, `fspad_no_sampling`, `fspad_no_alignment`, `eagle3`. All have the
quickstart's target and task, as many training steps, and three seeds; a further
`--config.target.init_from=W/standalone/target --config.target.train.steps=0` spares training the
target again. `--config.distill.data_source=target` trains on the target's own answers, which the
papers find better.

EAGLE-1 (arXiv 2401.15077), FSPAD (2408.15562, settled from its released code) and EAGLE-3
(2503.01840) with their losses, weights and noise: SmoothL1 on features and 0.1 cross-entropy on
the target's law; EAGLE-3 cross-entropy alone over unrolled steps. AdamW (0.9, 0.95) and clipping
by value at 0.5 are theirs as well; the learning rate is not (theirs, 3e-5 to 5e-5, is for
width 4096 and hundreds of thousands of steps), nor is the draft vocabulary, all 1000 tokens here.

Cost, and what was found: not yet run at this size.

Published (tau with trees, MT-bench, temperature 0, 7B or 8B targets, each in its own paper):
EAGLE-1 3.94 (Vicuna; its chain 3.20), EAGLE-2 with the same weights 4.98, EAGLE-3 6.13 against
4.05 of EAGLE-2 (LLaMA-3.1). FSPAD's tables are not known to us; 0.28 to 0.48 tokens a cycle over
EAGLE-2 are quoted of it. Here drafts are chains: compare with each other, not with these.
"""

import ml_collections

from configs import common

DRAFTS = {
    'standalone': None,
    'eagle': ('eagle', {}),
    'fspad': ('fspad', {}),
    'fspad_no_sampling': ('fspad', dict(feature_sampling=False)),
    'fspad_no_alignment': ('fspad', dict(partial_alignment=False)),
    'eagle3': ('eagle3', dict(unrolled_steps=5)),  # as the paper; gammas go up to 7
}


def get_config(arg: str = 'fspad') -> ml_collections.ConfigDict:
  if arg not in DRAFTS:
    raise ValueError(f'feature_drafts runs {", ".join(DRAFTS)}, not {arg!r}')
  config = common.study(f'feature_drafts_{arg}')
  config.task.update(name='stdlib_docs', max_length=64, prompt_length=12)
  config.target.model.update(num_layers=4, width=320, num_heads=5, num_kv_heads=5, head_dim=64,
                             mlp_width=864)
  config.target.train.update(steps=300, learning_rate=1.5e-3, warmup_steps=40, eval_every=300)
  config.evaluate.update(gammas=(3, 5, 7), num_prompts=16)
  config.distill.update(seeds=(0, 1, 2), control=False)
  config.distill.rollout.max_new_tokens = 48
  config.distill.train.update(steps=600, eval_every=200, checkpoint_every=200)
  if DRAFTS[arg] is None:  # the quickstart's
    config.draft.model.update(num_layers=2, width=128, num_heads=2, num_kv_heads=2, head_dim=64,
                              mlp_width=352)
    config.draft.train.update(steps=600, learning_rate=4e-3, eval_every=300, checkpoint_every=200)
    config.distill.train.learning_rate = 3e-3
    return config
  family, fields = DRAFTS[arg]
  config.draft.model = common.feature_draft(family)
  config.draft.model.update(fields)
  config.draft.train.steps = 0
  config.distill.update(objective='feature', data_source='fixed')
  config.distill.train.update(learning_rate=1e-3, clip_norm=None, clip_value=0.5,
                              schedule='linear', final_fraction=0.0)
  return config
