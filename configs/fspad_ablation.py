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

Cost: full scale not run; docs/tpu_slices.md has the programs of `fspad`. Twin:
some 20 minutes, estimated, not measured.

Published: no number of the ablation is known to us; all blank.

Ours: not run yet.
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
