"""DistillSpec, Fig. 1: standard speculative decoding against DistillSpec, task by task.

Zhou et al. 2023 (arXiv 2310.08461) draw the speed-up of T5 v1.1 XL with a small draft on XSum,
CNN/DM, WMT14 En-De and GSM8K, greedy and at temperature 1, and the mean of BIG-bench-hard, which is
in configs/distillspec_transfer.py. Here also LM1B with a decoder pair, of which the paper's speeds
are not known, and draft lengths 3, 5 and 7 (its re-implementation's). Each cell has standard SD
(the draft trained on the task), the control (as many further cross-entropy steps) and DistillSpec
(forward KL, the draft's own samples).

Full scale, a task a slice (v5e:4x4 to train, one chip to decode):

  launch/tpu_sweep.sh --slices=5 --delete configs/distillspec_speedup.py --config.bucket=gs://...
  python -m specdistill_jax.tables --config=configs/distillspec_speedup.py --workdir=gs://...

The twin, on two CPU cores. XSum, GSM8K and LM1B have embedded stand-ins (functions to summaries
with a T5 pair, word problems, running text); translation and long articles have none, so that WMT
and CNN/DM are not in it:

  python -m specdistill_jax.main --config=configs/distillspec_speedup.py:small \
    --workdir=runs/speedup --sweep=all
  python -m specdistill_jax.tables --config=configs/distillspec_speedup.py:small \
    --workdir=runs/speedup

Cost: full scale not run; rooflines of a step are in docs/tpu_slices.md for pod_t5_xl and pod_lm1b,
whose programs the cells xsum and lm1b are. Twin: 17 minutes on two cores.

Published: gains of 10 to 45 % in speed (abstract; 46 in other words of it); single bars could not
be recovered and stay blank below. The gain on WMT is small (reviews). Whether speeds were measured
or computed is not known.

Ours: the twin (docs/results.md; at gamma = 7 over standard SD, T = 0 and T = 1, block efficiency,
then speed). Running text: DistillSpec +19.3 % [11.5, 27.7] and +22.1 % [13.4, 32.6], speed +19.0 %
[7.8, 31.7] and +24.4 % [14.0, 36.7]; the control -1.2 and -8.4 %. Functions to summaries, T5:
+13.8 % [-2.5, 32.7] and +27.9 % [13.1, 43.5], speed +13.2 % [-1.2, 29.2] and +24.6 % [13.7, 36.4],
control +5.8 and +2.7 %. Word problems: +0.5 and +2.2 %, less than the control's +6.7 and +10.6 %.
The paper's range appears in two tasks of three (with T5 when greedy the interval holds 0); in the
third, rows that the generator never repeats may teach the draft as much. No draft beats so small a
target alone on a CPU (0.39 to 0.81 of its speed). Another run with the same settings, rounded
otherwise: +16.5 and +24.1 %, +10.0 and +24.7 %, +2.6 and +3.7 % in block efficiency.
"""

import ml_collections

from configs import common

CELLS = {'': ('xsum', 'cnn_dailymail', 'wmt14_en_de', 'gsm8k', 'lm1b'),
         'small': ('xsum', 'gsm8k', 'lm1b')}
PLOTS = ('bars',)
PUBLISHED = common.published(
    'gain in speed over standard SD', 'DistillSpec, Fig. 1', 'secondary; single bars not known',
    columns=(dict(temperature=0.0), dict(temperature=1.0)),
    lines=tuple((dict(cell=cell, objective='forward_kl'), (None, None)) for cell in CELLS['']
                if cell != 'lm1b')
) + common.published(
    'gain in speed over standard SD, all tasks', 'DistillSpec, abstract', 'paper',
    columns=({},), lines=((dict(objective='forward_kl'), ('10-45 %',)),))


def baseline(cell: str) -> dict:
  del cell
  return dict(objective='none')


def _study(scale: str, cell: str) -> ml_collections.ConfigDict:
  name = '_'.join(filter(None, ('distillspec_speedup', scale, cell)))
  if scale == 'small':
    config = common.distillspec_twin(name, cell)
    config.evaluate.gammas = (3, 5, 7)
    return config
  if cell == 'lm1b':
    return common.distillspec_lm1b(name)
  return common.distillspec_t5(name, cell)


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return _study(*common.cell_of(arg, CELLS))


def get_sweep(arg: str = '') -> list:
  scale = common.scale_of(arg, CELLS)
  return common.sweep({cell: _study(scale, cell) for cell in CELLS[scale]})
