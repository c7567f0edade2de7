"""DistillSpec, Fig. 6: a garden of models; distil the target first, then its draft.

Zhou et al. 2023 (arXiv 2310.08461): fine-tune the largest T5 v1.1 (11B), distil it into smaller
ones, take the smallest that is good enough as target, and DistillSpec the smallest of all for it.
Against plain decoding of undistilled models: latency 6 to 10 times lower at about equal quality.

Cells, for each size: `distil_<size>` distils the largest into it on its own samples (in the twin on
given text); `raw_<size>` decodes what it was before, alone and with the undistilled smallest draft;
`served_<size>` makes the distilled one the target, and DistillSpecs the smallest draft for it. The
largest model alone is a line of the first cell, which all are compared with.

  launch/tpu_sweep.sh --slices=1 --cells=0 configs/distillspec_garden.py \
    --config.bucket=gs://...     (full scale: XSum, on v4:2x2x4; then likewise --cells=1-3, and on
                                  v5e:4x4 --slices=6 --cells=4-9 --delete)
  python -m specdistill_jax.main --config=configs/distillspec_garden.py:small \
    --workdir=runs/garden --sweep=all                                     (twin: word problems)
  python -m specdistill_jax.tables --config=configs/distillspec_garden.py:small \
    --workdir=runs/garden --figure=speed --plots=runs/garden

Five sizes at full scale (77M, 250M, 800M, 3B, 11B), three in the twin (0.2M, 1.1M, 11M). GSM8K,
the figure's other task, is left out at full scale.
Quality: ROUGE-2; the twin's is that against worked solutions.

Cost: full scale not run; docs/tpu_slices.md has the programs of all sizes. Twin: 23 minutes on two
cores.

Published: below, first plain decoding at the raw family's best point, then the distilled target
with its DistillSpec draft. The unit of "relative latency" is not defined; which point of the plot
has which size is not known.

Ours: the twin (docs/results.md). At T = 0 the distilled target with its DistillSpec draft decodes
6.9 [6.4, 7.5] times as fast as the largest model alone, with a rouge2 of 19.5 for its 20.1 (before
distillation the same size has 11.9); at T = 1 6.8 [6.4, 7.3] times, with 15.4 for 16.8. The same
models a quarter of an hour earlier: 8.6 [7.9, 9.5] and 6.7; another run: 6.5 [5.9, 7.0] and 6.8, at
18.3 and 16.5. The distilled target alone is 11.5 [10.8, 12.1] and 10.1 times as fast: a draft slows
so small a target on a CPU (0.61x and 0.67x). DistillSpec gains nothing over the control here (3.10
tokens both when greedy, 3.32 and 3.36 at T = 1). On its own samples, 400 steps, the target stayed
at a rouge2 of 12.7; on given text with the largest model's laws, 1,200 steps, it came from 0.60 to
0.39 nats, where the largest has 0.34. A largest model of 5.1M gave 6.0 times on one core of one
machine, 4.8 on one of another, 4.5 on two: so small a model lives in caches.
"""

import ml_collections

from configs import common

SIZES = {'': ('base', 'large', 'xl'), 'small': ('medium',)}
CELLS = {scale: ('distil_small' if not scale else 'distil_medium',
                 *(f'distil_{size}' for size in sizes if not scale),
                 *(f'raw_{size}' for size in sizes), *(f'served_{size}' for size in sizes))
         for scale, sizes in SIZES.items()}
PLOTS = ('pareto',)
_FIGURE = 'DistillSpec, Fig. 6'
PUBLISHED = common.published(
    'relative latency, raw plain then distilled with DistillSpec', _FIGURE, 'secondary', ({},),
    ((dict(cell='XSum'), ('17.3 -> 2.7',)), (dict(cell='GSM8K'), ('15.0 -> 1.4',)))
) + common.published(
    'ratio of the two latencies', _FIGURE, 'derived', ({},),
    ((dict(cell='XSum'), ('6.4x',)), (dict(cell='GSM8K'), ('10.7x',)))
) + common.published(
    'quality, likewise', _FIGURE, 'secondary', ({},),
    ((dict(cell='XSum'), ('ROUGE-2 23.1 -> 23.0',)),
     (dict(cell='GSM8K'), ('accuracy 33.1 -> 34.8 %',)))
) + common.published(
    'ratio of latencies, both tasks', 'DistillSpec, abstract', 'paper', ({},),
    tuple((dict(cell=cell, objective='forward_kl'), ('6-10x',))
          for cell in ('served_medium', 'served_base', 'served_large', 'served_xl')))


def baseline(cell: str) -> dict:
  """The largest model alone."""
  return dict(cell='distil_medium' if 'medium' in cell else 'distil_small', objective='target')


# Of the twin, decoders.
_TWINS = {'small': dict(num_layers=1, width=96, num_heads=2, num_kv_heads=2, head_dim=48,
                        mlp_width=256),
          'medium': dict(num_layers=2, width=192, num_heads=3, num_kv_heads=3, head_dim=64,
                         mlp_width=528),
          'largest': dict(num_layers=6, width=384, num_heads=6, num_kv_heads=6, head_dim=64,
                          mlp_width=1056)}


def _full(name: str, target: str, draft: str) -> ml_collections.ConfigDict:
  config = common.distillspec_t5(name, 'xsum', target, draft)
  config.evaluate.topology = 'v4:1x1x1'  # the largest model needs it, and times are compared
  if draft in ('large', 'xl'):  # its state beside an 11B teacher: over all chips
    config.mesh.update(data=1, fsdp=-1)
    config.target.layout = config.draft.layout = 'sharded'
  return config


def _small(name: str, target: str, draft: str) -> ml_collections.ConfigDict:
  config = common.distillspec_twin(name, 'gsm8k')
  config.target.model.update(_TWINS[target])
  config.draft.model.update(_TWINS[draft])
  config.evaluate.num_prompts = 48
  if target == 'largest':
    config.target.train.update(steps=500, learning_rate=1.5e-3, eval_every=250)
  if draft == 'medium':
    config.draft.train.learning_rate = 2e-3
  return config


def _study(scale: str, cell: str) -> ml_collections.ConfigDict:
  name = '_'.join(filter(None, ('distillspec_garden', scale, cell)))
  step, _, size = cell.partition('_')
  largest = 'largest' if scale == 'small' else 'xxl'
  target, draft = (largest, size) if step == 'distil' else (size, 'small')
  config = (_small if scale == 'small' else _full)(name, target, draft)
  if step == 'raw':
    config.distill = None
  elif step == 'distil':
    config.distill.update(seeds=(0,), control=False)
    if scale == 'small':  # on its own samples it would take longer to come near the largest
      config.distill.data_source = 'fixed'
      config.distill.train.update(steps=1200, eval_every=400, checkpoint_every=400)
    if cell != CELLS[scale][0]:  # the largest model alone need be decoded once
      config.evaluate = None
  if config.evaluate is not None:
    config.evaluate.gammas = (5,)
  return config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return _study(*common.cell_of(arg, CELLS))


def get_sweep(arg: str = '') -> list:
  """The smallest draft is trained once, by the first cell at full scale, by `raw_` in the twin."""
  scale = common.scale_of(arg, CELLS)
  cells, taken = CELLS[scale], {}
  for cell in cells[1:]:
    step, _, size = cell.partition('_')
    draft = ('distil_small', 'draft') if not scale else ('raw_medium', 'draft')
    if step == 'distil':
      taken[cell] = dict(target=(cells[0], 'target'))
    else:
      source = 'fixed' if scale else 'draft'
      folder = 'draft' if step == 'raw' else f'distill/forward_kl-{source}-seed0'
      taken[cell] = dict(target=(f'distil_{size}', folder), draft=draft)
    if scale and step == 'raw':
      del taken[cell]['draft']
  return common.sweep({cell: _study(scale, cell) for cell in cells}, taken)
