"""FSPAD's main tables: EAGLE-1, EAGLE-2 and FSPAD on Spec-Bench, four targets, T = 0 and 1.

Gui et al. 2024 (arXiv 2408.15562), settled from their released code (Luc4Gui/FSPAD). Targets:
Vicuna 7B and 33B, Llama 3 Instruct 8B and 70B. EAGLE-1 is the row with the tree `eagle1`; EAGLE-2
is the same draft with the dynamic tree, which FSPAD takes too. A target has two cells,
`<target>_eagle` and `<target>_fspad`, which train on conversations and decode the 480 questions of
Spec-Bench, with a line for each category.

  launch/tpu_sweep.sh --slices=2 --cells=0,1 --delete configs/fspad_spec_bench.py \
    --config.bucket=gs://...                                                (docs/full_scale.md)
  python -m specdistill_jax.main --config=configs/fspad_spec_bench.py:small \
    --workdir=runs/spec_bench --sweep=all                                    (twin: running text)
  python -m specdistill_jax.tables --config=configs/fspad_spec_bench.py:small \
    --workdir=runs/spec_bench

The first command is that of Vicuna 7B; the other targets are cells 2 and 3, 4 and 5, 6 and 7, whose
training and decoding take slices of their own. Spec-Bench's file is `task.prompt_files`; MT-bench's
eight categories are one here, as there. A second turn without a reference answer to the first is
left out. FSPAD compared its 33B with EAGLE's
official weights; here both are trained. The twin has one target of 3.8M, three seeds, and no
categories.

Cost: full scale not run; docs/tpu_slices.md has the programs of FSPAD's cells.
Twin: 31 minutes on one core of a busy machine.

Published: FSPAD's own tables are not known to us, only that it generates 0.28 to 0.48 more tokens a
cycle than EAGLE-2 (secondary); its cells stay blank. Beside them stand EAGLE-1 and EAGLE-2 from
their papers, repositories and Spec-Bench's leaderboard, each with its own set-up: Spec-Bench times
prefill and drafts for Vicuna 1.3, FSPAD leaves prefill out and drafts for Vicuna 7B 1.5. Of the
leaderboard other methods (Hydra, Medusa, PLD, Lookahead and more) are left out.

Ours: the twin (docs/results.md): FSPAD generates 0.81 tokens a cycle more than EAGLE-2 at T = 0
(+29.6 % [21.6, 37.3]) and 0.19 more at T = 1 (+12.8 % [6.5, 19.9]). EAGLE-1 is behind EAGLE-2 when
greedy (-7.7 % [-13.1, -1.1]) and far before it at T = 1 (2.70 tokens a cycle, 1.49): the dynamic
tree holds the draft's best tokens and no draws, and of so flat a target (3.8 nats a token) those
are seldom drawn.
"""

import ml_collections

from configs import common

_TARGETS = tuple(common.FEATURE_TARGETS)
CELLS = {
    '': tuple(f'{target}_{draft}' for target in _TARGETS for draft in ('eagle', 'fspad')),
    'small': ('eagle', 'fspad'),
}
PLOTS = ('bars',)
_GREEDY, _WARM = dict(temperature=0.0), dict(temperature=1.0)
_CATEGORIES = tuple(_GREEDY | dict(category=name) for name in (
    'MT-bench', 'translation', 'summarization', 'qa', 'math_reasoning', 'rag', None))
_1, _2 = dict(tree='eagle1'), dict(tree='dynamic')


def _cell(target, draft='eagle'):
  return dict(cell=f'{target}_{draft}')


_7B, _33B = _cell('vicuna_7b'), _cell('vicuna_33b')
_LEADERBOARD = 'Spec-Bench leaderboard, A100, fp16, Vicuna 1.3'
_MT = (_GREEDY | dict(category='MT-bench'), _WARM | dict(category='MT-bench'))
PUBLISHED = (
    *common.published(
        'speed-up', _LEADERBOARD, 'third-party', _CATEGORIES,
        ((_7B | _2, ('2.84x', '1.88x', '2.34x', '2.15x', '2.79x', '2.13x', '2.36x')),
         (_7B | _1, ('2.45x', '1.77x', '2.08x', '1.93x', '2.44x', '1.87x', '2.10x')),
         (_33B | _2, ('3.01x', '2.10x', '2.51x', '2.27x', '3.30x', '2.29x', '2.59x')),
         (_33B | _1, ('2.75x', '2.04x', '2.42x', '2.16x', '2.97x', '2.20x', '2.43x')))),
    *common.published(
        'block efficiency', _LEADERBOARD, 'third-party', (_GREEDY,),
        ((_7B | _2, (4.34,)), (_7B | _1, (3.58,)), (_33B | _2, (4.05,)), (_33B | _1, (3.39,)))),
    *common.published(
        'block efficiency', 'EAGLE-1, Tables 1, 2, 5 and 7', 'paper', _MT,
        ((_7B | _1, (3.94, 3.17)), (_33B | _1, (3.68, 3.22)))),
    *common.published(
        'speed-up', 'EAGLE-1, figure of its repository', "authors' repository", _MT,
        ((_33B | _1, ('2.95x', None)),)),
    *common.published(
        'speed-up', 'EAGLE-2, Table 1', 'paper', _MT, ((_7B | _1, ('2.90x', '2.13x')),)),
    *common.published(
        'block efficiency', 'EAGLE-2, Table 1', 'paper', _MT, ((_7B | _2, (4.98, 4.28)),)),
    *common.published(
        'speed-up', 'EAGLE-2, Table 1', 'paper', _MT, ((_7B | _2, ('3.62x', '3.05x')),)),
    *common.published(
        'speed-up', 'EAGLE-2, figure of its repository', "authors' repository", _MT,
        ((_cell('llama3_8b') | _2, ('3.46x', None)), (_cell('llama3_8b') | _1, ('2.72x', None)),
         (_cell('llama3_70b') | _2, ('3.29x', None)), (_cell('llama3_70b') | _1, ('2.83x', None)))),
    *common.published(
        'gain over EAGLE-2, tokens a cycle', 'FSPAD, digest', 'secondary',
        ({},), tuple((dict(cell=cell) | _2, ('+0.28 to +0.48',)) for cell in (
            'fspad', *(_cell(target, 'fspad')['cell'] for target in _TARGETS)))),
    *common.published(
        'block efficiency', 'FSPAD', 'not known', (_GREEDY, _WARM),
        tuple((_cell(target, 'fspad') | _2, (None, None)) for target in _TARGETS)))


def baseline(cell: str) -> dict:
  """EAGLE-2: the same target's draft by EAGLE's loss, with the dynamic tree."""
  return dict(cell=cell.replace('fspad', 'eagle'), tree='dynamic')


def _study(scale: str, cell: str) -> ml_collections.ConfigDict:
  name = '_'.join(filter(None, ('fspad_spec_bench', scale, cell)))
  if scale == 'small':
    config = common.feature_twin(name, cell)
  else:
    target, _, draft = cell.rpartition('_')
    config = common.feature_pod(name, target, draft)
    config.task.prompt_files = ('{bucket}/spec_bench/question.jsonl',)
    config.evaluate.num_prompts = None
  if cell.endswith('fspad'):
    config.evaluate.trees = config.evaluate.trees[-1:]
  elif scale == 'small':
    config.evaluate.trees = ('eagle1', *config.evaluate.trees)
  return config


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  return _study(*common.cell_of(arg, CELLS))


def get_sweep(arg: str = '') -> list:
  """The twin's target is trained once; at full scale targets are imported."""
  if arg:
    return common.sweep_on_one_target(arg, CELLS, _study)
  return common.sweep({cell: _study('', cell) for cell in CELLS['']})
