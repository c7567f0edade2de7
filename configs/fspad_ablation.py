"""FSPAD's ablation: feature sampling and partial alignment, each taken away.

Gui et al. 2024 (arXiv 2408.15562). Their released code (Luc4Gui/FSPAD) has the variants: full
FSPAD, `no_alignment` (EAGLE with feature sampling, one output), `no_sampling` (partial alignment, a
plain linear input), and EAGLE without both, retrained alike; all with EAGLE-2's dynamic tree.

  launch/tpu_sweep.sh --slices=4 --delete configs/fspad_ablation.py --config.bucket=gs://...
  python -m specdistill_jax.main --config=configs/fspad_ablation.py:small \
    --workdir=runs/ablation --sweep=all                                      (twin: running text)
  python -m specdistill_jax.tables --config=configs/fspad_ablation.py:small --workdir=runs/ablation

Full scale: Vicuna 7B on ShareGPT, v5e:2x2, with held-out conversations as prompts. The line of
EAGLE is the control: as many steps on as many rows.

Cost: full scale not run; docs/tpu_slices.md has the programs of `fspad`. Twin: 23 minutes on two
cores.

Published: no number of the ablation is known to us; all blank.

Ours: the twin (docs/results.md; with EAGLE-2's tree, over EAGLE, T = 0 and T = 1): FSPAD +29.6 %
[21.6, 37.3] and +13.4 % [6.8, 20.0], 0.81 and 0.20 tokens a cycle; without partial alignment +28.7
and +14.6 %; without feature sampling +3.8 % [-0.2, 7.6] and +1.0 % [-4.0, 6.4]. So feature sampling
is all of it, as on a target of 10M and, as far as it goes, on GSM8K (configs/feature_drafts.py).
Partial alignment shows nothing after 800 steps instead of 200 either: +0.3 % [-1.9, 2.6] and +1.1 %
[-3.8, 7.0].
"""

import ml_collections

from configs import common

DRAFTS = {
    'eagle': ('eagle', {}),
    'no_sampling': ('fspad', dict(feature_sampling=False)),
    'no_alignment': ('fspad', dict(partial_alignment=False)),
    'fspad': ('fspad', {}),
}
CELLS = {'': tuple(DRAFTS), 'small': tuple(DRAFTS)}
PLOTS = ('bars',)
PUBLISHED = common.published(
    'block efficiency', 'FSPAD, ablation', 'not known',
    (dict(temperature=0.0, tree='dynamic'), dict(temperature=1.0, tree='dynamic')),
    tuple((dict(cell=cell, objective='feature'), (None, None)) for cell in DRAFTS))


def baseline(cell: str) -> dict:
  del cell
  return dict(cell='eagle', objective='feature')


def _study(scale: str, cell: str) -> ml_collections.ConfigDict:
  name = '_'.join(filter(None, ('fspad_ablation', scale, cell)))
  family, fields = DRAFTS[cell]
  if scale == 'small':
    return common.feature_twin(name, family, **fields)
  config = common.feature_pod(name, 'vicuna_7b', family)
  config.draft.model.update(fields)
  config.evaluate.trees = config.evaluate.trees[-1:]
  return config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return _study(*common.cell_of(arg, CELLS))


def get_sweep(arg: str = '') -> list:
  return common.sweep_on_one_target(arg, CELLS, _study)
