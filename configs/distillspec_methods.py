"""DistillSpec, Figs. 2, 3a and 5a: methods of distillation, what they cost, what drafts are worth.

One grid for three figures of Zhou et al. 2023 (arXiv 2310.08461). A method is a divergence and the
source of its data (their Table 1; numbers of figures are as secondary sources give them):

| cell | method | divergence | data |
|---|---|---|---|
| seqkd | SeqKD | cross-entropy with the target's tokens | target |
| supervised_kd | Supervised KD | forward KL | fixed |
| imitkd | ImitKD | forward KL | fixed + draft |
| f_distill | f-Distill | TVD | target + draft |
| gkd | on-policy GKD | forward KL, JSD, reverse KL | draft |

Fig. 2 compares their block efficiency; Fig. 3a puts its gain over the wall time of training, which
`tables` takes from each cell's stage `distill` (writing the target's samples included, and the
control where there is one); Fig. 5a puts it over the draft's own quality, which `tables` gives as
held-out cross-entropy (the paper: the task's score).

  launch/tpu_sweep.sh --slices=1 --cells=0 configs/distillspec_methods.py \
    --config.bucket=gs://...     (full scale: XSum, v5e:4x4; then --slices=4 --cells=1-4 --delete)
  python -m specdistill_jax.main --config=configs/distillspec_methods.py:small \
    --workdir=runs/methods --sweep=all                                   (twin: word problems)
  python -m specdistill_jax.tables --config=configs/distillspec_methods.py:small \
    --workdir=runs/methods --plots=runs/methods

The first cell trains target and draft, and its control; the others take both from it.

Cost: full scale not run. Twin: 24 minutes on one core of a busy machine.

Published: SeqKD clearly below methods with the teacher's logits, Supervised KD on fixed data below
those on model-generated text, f-Distill and GKD best, f-Distill much dearer, since it samples from
the target; GKD is the best balance of gain and cost. The draft's own score hardly tells its block
efficiency. No value could be recovered: all blank.

Ours: the twin (docs/results.md; gains in block efficiency over standard SD at T = 0 and T = 1, 95 %
intervals some 6 and 9 points either way): control +4.5 and +9.8 %, SeqKD +7.3 and +6.2, Supervised
KD +7.3 and +10.8, ImitKD +3.1 and +6.3, f-Distill -3.6 and +14.4, GKD by forward KL +2.6 and +3.7,
by JSD -3.1 and +9.9, by reverse KL -11.4 and +8.1. So the paper's order does not appear: the
target's logits on fixed rows do as well as anything on the draft's own, and hardly better than more
cross-entropy. The problems are drawn from one generator, of which the target has learnt the law:
fixed rows are as good as its own. What does appear: on the draft's own samples divergences that let
it leave modes out do worse when greedy than at temperature 1 (reverse KL -11.4 % [-18.6, -4.1] and
+8.1 %; JSD and, with the target's samples, TVD likewise, within chance); and Fig. 5a's point: at
temperature 1 drafts of 1.5 and 1.6 nats (reverse KL, TVD) do as well as those of 0.75. At 120
steps, and a learning rate of 3e-3, no method gained anything.

On running text (docs/results.md, the speed-ups' twin with other data) the data make no difference
at temperature 1: forward KL gains 23 % on fixed rows, 24 to 25 % on the target's, the draft's, or
both. Greedy, fixed rows are best, against the paper: 29 %, and 16.5 to 18.1 % on the others.
"""

import ml_collections

from configs import common

METHODS = {  # objective, further ones, source of data
    'seqkd': ('cross_entropy', (), 'target'),
    'supervised_kd': ('forward_kl', (), 'fixed'),
    'imitkd': ('forward_kl', (), 'fixed+draft'),
    'f_distill': ('tvd', (), 'target+draft'),
    'gkd': ('forward_kl', ('jsd', 'reverse_kl'), 'draft'),
}
CELLS = {'': tuple(METHODS), 'small': tuple(METHODS)}
PLOTS = ('bars', 'cost', 'draft_quality')
PUBLISHED = common.published(
    'gain in block efficiency at γ = 7', 'DistillSpec, Fig. 2', 'secondary; values not known',
    columns=(dict(temperature=0.0), dict(temperature=1.0)),
    lines=tuple((dict(cell=cell, objective=objective, data_source=source), (None, None))
                for cell, (objective, _, source) in METHODS.items()))


def baseline(cell: str) -> dict:
  del cell
  return dict(objective='none')


def _study(scale: str, cell: str) -> ml_collections.ConfigDict:
  name = '_'.join(filter(None, ('distillspec_methods', scale, cell)))
  config = (common.distillspec_twin(name, 'gsm8k') if scale == 'small'
            else common.distillspec_t5(name, 'xsum'))
  objective, also, source = METHODS[cell]
  config.distill.update(objective=objective, also=also, data_source=source,
                        control=cell == CELLS[scale][0])
  config.evaluate.gammas = (7,)
  return config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return _study(*common.cell_of(arg, CELLS))


def get_sweep(arg: str = '') -> list:
  cells = CELLS[common.scale_of(arg, CELLS)]
  shared = dict(target=(cells[0], 'target'), draft=(cells[0], 'draft'))
  return common.sweep({cell: _study(arg, cell) for cell in cells},
                      {cell: shared for cell in cells[1:]})
