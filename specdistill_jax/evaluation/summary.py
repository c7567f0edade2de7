"""Rows pooled over seeds, one `Summary` for each method, temperature and way to speculate.

Pooling sums counts over seeds before any ratio; intervals resample prompts and seeds together
(`intervals.bootstrap`), and comparisons of two methods are paired by prompt.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from specdistill_jax.decoding import tree_names
from specdistill_jax.evaluation import acceptance
from specdistill_jax.evaluation import intervals
from specdistill_jax.evaluation import measures
from specdistill_jax.evaluation import rows as rows_lib

STANDARD = 'standard SD'
CONTROL = 'control'
SEQKD = 'SeqKD'
MEAN = 'mean of categories'
WAY = ('draft_sampling', 'rule', 'epsilon', 'min_confidence', 'tree')  # beside gamma


@dataclasses.dataclass(frozen=True)
class Summary:
  """One method, temperature and way to speculate; names as in `rows.FIELDS`.

  Attributes:
    category: of the prompts; None: all of them.
    method: 'standard SD' (undistilled), 'control' (as many further cross-entropy steps), 'SeqKD'
      (cross-entropy on the target's text), 'feature-level draft (data source)' by its paper's own
      loss, 'DistillSpec (objective, data source)' where a draft learns on its own text, or
      'distilled (objective, data source)'.
    devices: that its rows were measured on.
    counts_kpc: `[seeds, batches, len(rows.COUNTS)]`.
  """
  category: str | None
  method: str
  objective: str
  temperature: float
  gamma: int
  draft_sampling: str
  rule: str
  epsilon: float
  min_confidence: float
  tree: str
  num_seeds: int
  alpha: float
  alpha_interval: intervals.Interval | None
  block_efficiency: float
  block_efficiency_interval: intervals.Interval | None
  drafted_per_call: float
  speedup_measured: float
  speedup_measured_interval: intervals.Interval | None
  speedup_predicted: float
  cost_ratio: float
  verify_ratio: float
  tokens_per_second: float
  autoregressive_tokens_per_second: float
  acceptance_by_position: list[float | None]
  reached_by_position: list[int]
  quality_metric: str | None
  quality: float | None
  target_quality: float | None
  lossless: bool
  devices: tuple[str, ...]
  counts_kpc: np.ndarray

  @property
  def is_distilled(self) -> bool:
    return self.method not in (STANDARD, CONTROL)

  @property
  def is_tree(self) -> bool:
    return self.tree != tree_names.CHAIN

  @property
  def way(self) -> str:
    """Rule, draft mode and draft shape in words; a lossy rule says so."""
    words = self.rule if self.lossless else f'{self.rule} ε={self.epsilon:.2g}, lossy'
    words += f', tree {self.tree}' * self.is_tree
    words += ', greedy drafts' * (self.draft_sampling == 'greedy')
    return words + f', stops below {self.min_confidence:g}' * (self.min_confidence > 0)


def method(row: Mapping[str, Any]) -> str:
  """What a row's draft is called in tables and plots."""
  if row['objective'] == 'none':
    return STANDARD
  if row['objective'] == 'cross_entropy':
    return CONTROL if row['data_source'] == 'fixed' else SEQKD
  if row['objective'] == 'feature':  # such a draft by its papers' own loss
    return f'feature-level draft ({row["data_source"]})'
  name = 'DistillSpec' if 'draft' in row['data_source'] else 'distilled'
  return f'{name} ({row["objective"]}, {row["data_source"]})'


def _pool(rows: Sequence[Mapping[str, Any]], samples: int) -> Summary:
  counts_kpc = np.array([row['counts'] for row in rows], np.float64)
  total = counts_kpc.sum(axis=(0, 1))
  seconds = {name: sum(row[name] for row in rows)
             for name in ('target_step_seconds', 'draft_step_seconds', 'verify_seconds')}
  cost_ratio = seconds['draft_step_seconds'] / seconds['target_step_seconds']
  verify_ratio = seconds['verify_seconds'] / seconds['target_step_seconds']
  tau = float(intervals.ratio(measures.block_efficiency_counts(total)))
  drafted_per_call = float(intervals.ratio(measures.drafted_counts(total)))
  draft_steps = measures.steps_per_call(rows[0]['tree'], rows[0]['gamma'], drafted_per_call)
  interval = lambda columns, statistic: intervals.bootstrap(
      columns(counts_kpc), statistic, samples=samples)
  rate = lambda *names: float(intervals.ratio(measures.columns(total, *names)))
  mean = lambda name: (None if any(row[name] is None for row in rows)
                       else float(np.mean([row[name] for row in rows])))
  first = rows[0]
  reached, accepted = (np.sum([row[name] for row in rows], axis=0)
                       for name in ('reached_by_position', 'accepted_by_position'))
  return Summary(
      category=first.get('category'), method=method(first), objective=first['objective'],
      temperature=first['temperature'], num_seeds=len(rows),
      **{name: first[name] for name in ('gamma', *WAY)},
      alpha=float(intervals.ratio(measures.alpha_counts(total))),
      alpha_interval=interval(measures.alpha_counts, intervals.ratio),
      block_efficiency=tau,
      block_efficiency_interval=interval(measures.block_efficiency_counts, intervals.ratio),
      speedup_measured=float(intervals.ratio_of_ratios(measures.speedup_counts(total))),
      speedup_measured_interval=interval(measures.speedup_counts, intervals.ratio_of_ratios),
      drafted_per_call=drafted_per_call,
      speedup_predicted=measures.speedup_predicted(tau, draft_steps, cost_ratio, verify_ratio),
      cost_ratio=cost_ratio, verify_ratio=verify_ratio,
      tokens_per_second=rate('emitted', 'seconds'),
      autoregressive_tokens_per_second=rate('autoregressive_emitted', 'autoregressive_seconds'),
      acceptance_by_position=acceptance.by_position(accepted, reached),
      reached_by_position=reached.tolist(),
      quality_metric=first['quality_metric'], quality=mean('quality'),
      target_quality=mean('target_quality'), lossless=all(row['lossless'] for row in rows),
      devices=tuple(sorted({row['device'] for row in rows})), counts_kpc=counts_kpc)


def summarise(rows: Iterable[Mapping[str, Any]], *, samples: int,
              by_category: bool = False) -> list[Summary]:
  """Pools rows over seeds; by temperature, draft length, method, way as in rows, and category.

  Those of all prompts, or those of single categories, if `by_category`.
  """
  groups: dict[tuple[Any, ...], dict[int, Mapping[str, Any]]] = {}
  ways: dict[tuple[Any, ...], int] = {}
  for row in rows:
    category = row.get('category')
    if by_category is (category is None):
      continue
    way = ways.setdefault(tuple(row[name] for name in WAY), len(ways))
    group = (row['temperature'], row['gamma'], _rank(row), method(row), way, category)
    groups.setdefault(group, {})[row['seed']] = row
  return [_pool(list(groups[group].values()), samples) for group in sorted(groups)]


def equally(whole: Summary, parts: Sequence[Summary], *, samples: int) -> Summary:
  """The categories `parts` of `whole` with as much weight each, however many prompts they have.

  alpha and block efficiency are means over the categories; a speed is that of as many calls in
  each. Prices of steps and acceptance by position stay those of all prompts.
  """
  shares = dict(target_calls=('emitted', 'target_calls', 'seconds', 'drafted'),
                overlap_tokens=('overlap', 'overlap_tokens'),
                autoregressive_emitted=('autoregressive_emitted', 'autoregressive_seconds'))
  at = rows_lib.COUNTS.index
  scaled = [part.counts_kpc.copy() for part in parts]
  for counts_kpc in scaled:
    for of, names in shares.items():
      counts_kpc[..., [at(name) for name in names]] /= counts_kpc[..., at(of)].sum()
  counts_kpc = np.concatenate(scaled, axis=1)
  total = counts_kpc.sum(axis=(0, 1))
  made = {}
  for name, columns, statistic in (
      ('alpha', measures.alpha_counts, intervals.ratio),
      ('block_efficiency', measures.block_efficiency_counts, intervals.ratio),
      ('speedup_measured', measures.speedup_counts, intervals.ratio_of_ratios)):
    made[name] = float(statistic(columns(total)))
    made[f'{name}_interval'] = intervals.bootstrap(columns(counts_kpc), statistic, samples=samples)
  rate = lambda *names: float(intervals.ratio(measures.columns(total, *names)))
  mean = lambda values: None if None in values else float(np.mean(values))
  return dataclasses.replace(
      whole, **made, category=MEAN, counts_kpc=counts_kpc,
      tokens_per_second=rate('emitted', 'seconds'),
      autoregressive_tokens_per_second=rate('autoregressive_emitted', 'autoregressive_seconds'),
      quality=mean([part.quality for part in parts]),
      target_quality=mean([part.target_quality for part in parts]))


def headline(summaries: Sequence[Summary]) -> list[Summary]:
  """Of each temperature, chains in its first lossless way: what methods are compared in.

  In no lossless way, those in the first one, which say of themselves that they are lossy.
  """
  found = []
  for temperature in dict.fromkeys(s.temperature for s in summaries):
    chosen = [s for s in summaries if s.temperature == temperature and not s.is_tree]
    first = next((s.way for s in chosen if s.lossless), chosen[0].way)
    found += [s for s in chosen if s.way == first]
  return found


def _rank(row: Mapping[str, Any]) -> int:
  return {STANDARD: 0, CONTROL: 1}.get(method(row), 2)


def compare(one: Summary, other: Summary, columns: Callable[[np.ndarray], np.ndarray],
            statistic: Callable[[np.ndarray], np.ndarray], *,
            samples: int) -> tuple[float, intervals.Interval | None]:
  """A statistic of two methods' summed counts, paired by prompt, with its interval.

  Methods with as many seeds are paired by seed too.

  Args:
    columns: picks `[..., c]` of the counts; those of `one` come before those of `other`.
    statistic: `[..., 2 c]` to `[...]`.
  """
  arms = [columns(summary.counts_kpc) for summary in (one, other)]
  value = float(statistic(np.concatenate([arm.sum(axis=(0, 1)) for arm in arms])))
  return value, intervals.bootstrap(arms, statistic, samples=samples)


def gain_in_block_efficiency(one: Summary, other: Summary, *, samples: int):
  """tau of `one` over tau of `other`, with its interval."""
  return compare(one, other, measures.block_efficiency_counts, intervals.ratio_of_ratios,
                 samples=samples)


def gain_in_alpha(one: Summary, other: Summary, *, samples: int):
  """alpha of `one` less alpha of `other`, with its interval."""
  difference = lambda c: c[..., 0] / c[..., 1] - c[..., 2] / c[..., 3]
  return compare(one, other, measures.alpha_counts, difference, samples=samples)


def gain_in_speed(one: Summary, other: Summary, *, samples: int):
  """Tokens per second of `one` over those of `other`, with its interval."""
  speed = lambda counts: measures.columns(counts, 'emitted', 'seconds')
  return compare(one, other, speed, intervals.ratio_of_ratios, samples=samples)
