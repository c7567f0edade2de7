"""DistillSpec, Fig. 5b: what leniency buys on GSM8K, three lenience functions over epsilon.

Zhou et al. 2023 (arXiv 2310.08461) accept with probability min(1, f(target, epsilon) / draft):
linear (target / epsilon), square (target / epsilon^2), exponential (target^epsilon); epsilon = 1 is
lossless. Quality against latency, for the undistilled and the distilled draft. Their grid of
epsilon, temperature, and what they do after a rejection and at temperature 0 are not known; here
epsilon halves from 1 to 1/32, at temperature 1, the residual is the strict one.

  python -m specdistill_jax.main --config=configs/distillspec_lossy.py --workdir=gs://... \
    --config.bucket=gs://...                                  (v5e:4x4; docs/full_scale.md)
  python -m specdistill_jax.main --config=configs/distillspec_lossy.py:small \
    --workdir=runs/lossy --sweep=all
  python -m specdistill_jax.tables --config=configs/distillspec_lossy.py:small \
    --workdir=runs/lossy --plots=runs/lossy

configs/lossy.py beside it has typical and top-k acceptance and greedy leniency as well.

Cost: full scale not run. Twin: 19 minutes on one core of a busy machine.

Published: no value of the figure could be recovered. In words: leniency costs little accuracy on
GSM8K, linear and square interpolate in a limited range, exponential gives a usable curve, the
distilled draft dominates. Below: Leviathan et al.'s linear lenience on another task and target
(speeds at T = 1 with c = 0.015, at T = 0 with gamma = 8).

Ours: the twin (docs/results.md; no speeds: the machine was busy). Leniency buys tokens a cycle and
costs quality soon: of the undistilled draft linear 0.5 gives 2.88 -> 3.21 tokens and a rouge2 of
14.7 (lossless lines have 15.3 to 17.9, by chance), linear 1/32 3.80 and 12.6, exponential 0.5 3.69
and 11.8, exponential 0.25 4.87 and 5.7: at equal quality linear gives as many tokens as exponential
or more. The distilled draft does not dominate: on word problems it gains 5.5 % [1.9, 9.1] when
lossless, the control 6.6 % [3.7, 10.1] (paired by batch), and with leniency the control's text is
the better of the two. Not tried: running text, on which DistillSpec gains, since it has no metric.
"""

import ml_collections

from configs import common

CELLS = {'': ('gsm8k',), 'small': ('gsm8k',)}
PLOTS = ('pareto',)
EPSILONS = (0.5, 0.25, 0.125, 0.0625, 0.03125)
_GRID = tuple(dict(rule=rule, epsilon=epsilon) for rule in ('linear', 'square', 'exponential')
              for epsilon in EPSILONS)
_OTHER = dict(cell='wmt14_en_de, T5 XXL and small', objective='none', rule='linear')
_LENIENCE = tuple(dict(epsilon=epsilon) for epsilon in (1.0, 0.5, 0.3, 0.1))
_LEVIATHAN = 'Leviathan et al. 2023 (arXiv 2211.17192), lenience'
PUBLISHED = (
    *common.published(
        'accuracy against latency', 'DistillSpec, Fig. 5b', 'secondary; values not known',
        columns=tuple(dict(rule=rule) for rule in ('linear', 'square', 'exponential')),
        lines=tuple((dict(cell='gsm8k', objective=objective), (None, None, None))
                    for objective in ('none', 'forward_kl'))),
    *common.published('alpha', _LEVIATHAN, 'paper', _LENIENCE, (
        (_OTHER | dict(temperature=1.0), (0.62, 0.71, 0.76, 0.84)),
        (_OTHER | dict(temperature=0.0), (0.75, 0.75, 0.80, 0.87)))),
    *common.published('speed-up', _LEVIATHAN, 'paper', _LENIENCE, (
        (_OTHER | dict(temperature=1.0), ('2.5x', '3.1x', '3.6x', '5x')),
        (_OTHER | dict(temperature=0.0), ('3.3x', '3.3x', '3.9x', '4.9x')))))


def baseline(cell: str) -> dict:
  del cell
  return dict(objective='none', rule='exact')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  scale, cell = common.cell_of(arg, CELLS)
  name = '_'.join(filter(None, ('distillspec_lossy', scale, cell)))
  config = (common.distillspec_twin(name, cell) if scale == 'small'
            else common.distillspec_t5(name, cell))
  config.distill.control = scale == 'small'
  config.evaluate.update(
      temperatures=(1.0,), gammas=(5,),
      rules=(('exact', 1.0), *((about['rule'], about['epsilon']) for about in _GRID)))
  if scale == 'small':
    config.evaluate.update(num_prompts=64, batch_size=8)
  return config


def get_sweep(arg: str = '') -> list:
  return common.sweep({cell: get_config(f'{arg},{cell}')
                       for cell in CELLS[common.scale_of(arg, CELLS)]})
