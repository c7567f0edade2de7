"""Result rows of an imaginary study, as the evaluate stage would write them."""

import json
import pathlib

import numpy as np

from configs import common
from specdistill_jax.evaluation import intervals
from specdistill_jax.evaluation import measures
from specdistill_jax.evaluation import rows
from specdistill_jax.stages import workdirs

VERIFY_RATIO = {3: 1.25, 5: 1.4}
COST_RATIO, TARGET_SECONDS, NEW_TOKENS, PROMPTS = 0.1, 2e-3, 48, 12


def config():
  made = common.study('imaginary')
  made.evaluate.gammas = tuple(VERIFY_RATIO)
  made.evaluate.bootstrap_samples = 100
  return made


def _decode(rng, alpha, gamma):
  """Counts of each prompt, drafts being kept with probability alpha."""
  calls, reached, accepted = np.zeros(PROMPTS), np.zeros(gamma, int), np.zeros(gamma, int)
  for prompt in range(PROMPTS):
    emitted = 0
    while emitted < NEW_TOKENS:
      kept = int(np.argmin(np.append(rng.random(gamma) < alpha, False)))
      reached[:kept + 1] += 1
      accepted[:kept] += 1
      emitted += kept + 1
      calls[prompt] += 1
  return calls, reached, accepted


def row(rng, hashed, *, objective, data_source, seed, alpha, temperature, gamma, slowdown=1.0):
  calls, reached, accepted = _decode(rng, alpha, gamma)
  cycle = TARGET_SECONDS * (gamma * COST_RATIO + VERIFY_RATIO[gamma])
  columns = dict(
      emitted=NEW_TOKENS, target_calls=calls,
      seconds=slowdown * calls * cycle * rng.normal(1, 0.03, PROMPTS),
      autoregressive_emitted=NEW_TOKENS,
      autoregressive_seconds=NEW_TOKENS * TARGET_SECONDS * rng.normal(1, 0.03, PROMPTS),
      drafted=gamma * calls,
      overlap=NEW_TOKENS * (alpha + rng.normal(0, 0.02, PROMPTS)), overlap_tokens=NEW_TOKENS)
  counts = np.stack([np.broadcast_to(columns[name], PROMPTS) for name in rows.COUNTS], axis=1)
  total = counts.sum(axis=0)
  tau = float(intervals.ratio(measures.block_efficiency_counts(total)))
  return rows.make(
      study='imaginary', task='stdlib_docs', target='decoder 4x256', draft='decoder 1x96',
      objective=objective, data_source=data_source, seed=seed, temperature=temperature,
      gamma=gamma, rule='exact', epsilon=1.0, lossless=True, draft_sampling='sampled',
      min_confidence=0.0, tree='chain', drafted_per_call=gamma, batch_size=1, num_prompts=PROMPTS,
      max_new_tokens=NEW_TOKENS, target_parameters=3_500_000, draft_parameters=210_000,
      alpha=float(intervals.ratio(measures.alpha_counts(total))), block_efficiency=tau,
      speedup_measured=float(intervals.ratio_of_ratios(measures.speedup_counts(total))),
      speedup_predicted=measures.speedup_predicted(tau, gamma, COST_RATIO, VERIFY_RATIO[gamma]),
      target_step_seconds=TARGET_SECONDS, draft_step_seconds=TARGET_SECONDS * COST_RATIO,
      verify_seconds=TARGET_SECONDS * VERIFY_RATIO[gamma], reached_by_position=reached.tolist(),
      accepted_by_position=accepted.tolist(), device='cpu', config_hash=hashed,
      counts=counts.tolist())


def study(*, distilled=0.8, plain=0.5, slowdown=1.0, seeds=(0, 1)) -> list[dict]:
  """All rows: an undistilled draft that agrees `plain`, one that agrees `distilled`, controls."""
  rng = np.random.default_rng(0)
  hashed = rows.config_hash(workdirs.to_json(config()))
  arms = [dict(objective='none', data_source=None, seed=0, alpha=plain)]
  for seed in seeds:
    arms.append(dict(objective='forward_kl', data_source='draft', seed=seed, alpha=distilled))
    arms.append(dict(objective='cross_entropy', data_source='fixed', seed=seed, alpha=plain))
  return [row(rng, hashed, temperature=temperature, gamma=gamma, slowdown=slowdown, **arm)
          for temperature in (0.0, 1.0) for gamma in VERIFY_RATIO for arm in arms]


def lossy_study() -> list[dict]:
  """Beside `study`, in three more ways and with qualities; the faster ways answer worse."""
  rng = np.random.default_rng(1)
  made = [dict(line, quality=50.0, target_quality=50.0, quality_metric='accuracy')
          for line in study(seeds=(0,))]
  ways = (dict(rule='block', alpha=0.82, quality=51.0),
          dict(rule='linear', epsilon=0.5, alpha=0.9, quality=48.0),
          dict(rule='linear', epsilon=0.1, alpha=0.97, quality=30.0))
  arm = dict(objective='forward_kl', data_source='draft', seed=0, gamma=5, temperature=1.0)
  for way in ways:
    line = row(rng, made[0]['config_hash'], alpha=way.pop('alpha'), **arm)
    made.append(dict(line, target_quality=50.0, quality_metric='accuracy',
                     lossless='epsilon' not in way, **way))
  return made


def tree_study() -> list[dict]:
  """Beside `study`, a tree of 25 nodes on 5 levels by each draft; it keeps more."""
  rng, made = np.random.default_rng(2), study(seeds=(0,))
  for objective, data_source, alpha in (('none', None, 0.7), ('forward_kl', 'draft', 0.9)):
    line = row(rng, made[0]['config_hash'], objective=objective, data_source=data_source, seed=0,
               alpha=alpha, temperature=1.0, gamma=5)
    counts = np.array(line['counts'])
    counts[:, rows.COUNTS.index('drafted')] *= 5
    made.append(dict(line, tree='eagle1', drafted_per_call=25.0, counts=counts.tolist()))
  return made


def write(workdir: pathlib.Path, made: list[dict]) -> None:
  for line in made:
    rows.append(workdir / 'results.jsonl', line)
  with open(workdir / 'metrics.jsonl', 'w', encoding='utf-8') as file:
    for name in ('forward_kl-draft', 'cross_entropy-fixed'):
      for seed in (0, 1):
        for step in (0, 50, 100):
          figures = dict(step=step, loss=1.0, validation_alpha=0.5 + step / 500 + 0.01 * seed)
          file.write(json.dumps(dict(stage='distill', run=f'{name}-seed{seed}') | figures) + '\n')
    file.write(json.dumps(dict(stage='target', run='target', step=0, loss=2.0)) + '\n')
