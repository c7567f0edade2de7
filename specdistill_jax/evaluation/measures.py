"""From runs and counts to the figures of a results row; sums come before ratios."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specdistill_jax.decoding import tree_names
from specdistill_jax.evaluation import acceptance
from specdistill_jax.evaluation import intervals
from specdistill_jax.evaluation import latency
from specdistill_jax.evaluation import rows
from specdistill_jax.evaluation import step_costs


def steps_per_call(tree: str, gamma: int, drafted_per_call: float) -> float:
  """Draft steps of a cycle: a token each in a chain, a level each in a tree.

  Chains that stop early take as many as they draft, on the mean; rows of one batch draft on until
  the last has stopped, so that there it is too few.
  """
  return drafted_per_call if tree == tree_names.CHAIN else gamma


def speedup_predicted(block_efficiency: float, draft_steps: float, cost_ratio: float,
                      verify_ratio: float) -> float:
  """tau / (gamma c + v): Leviathan et al. 2023, Theorem 3.8, with a verification that costs.

  `draft_steps` is gamma, or as `steps_per_call` has it.
  """
  return block_efficiency / (draft_steps * cost_ratio + verify_ratio)


def mbsu(block_efficiency: float, draft_steps: float, draft_parameters: int,
         target_parameters: int) -> float:
  """Memory-bound speed-up: a step costs what its parameters weigh (arXiv 2403.00858).

  Of a draft its own parameters count, not the target's embedding and head that it may read.
  """
  return block_efficiency / (draft_steps * draft_parameters / target_parameters + 1.0)


def columns(counts: np.ndarray, *names: str) -> np.ndarray:
  """The columns called `names` of `[..., len(rows.COUNTS)]` counts."""
  return np.asarray(counts)[..., [rows.COUNTS.index(name) for name in names]]


def counts_by_batch(alone: Sequence[latency.Run], runs: Sequence[latency.Run],
                    overlaps: np.ndarray) -> np.ndarray:
  """`[batches, len(rows.COUNTS)]`, in the order of `rows.COUNTS`."""
  return np.array([
      [run.generation.lengths.sum(), run.generation.stats.target_calls_b.sum(), run.seconds,
       baseline.generation.lengths.sum(), baseline.seconds, *overlap,
       run.generation.stats.drafted_b.sum()]
      for baseline, run, overlap in zip(alone, runs, overlaps, strict=True)], np.float64)


def block_efficiency_counts(counts: np.ndarray) -> np.ndarray:
  """For `intervals.ratio`: emitted tokens and target calls, `[..., 2]`."""
  return columns(counts, 'emitted', 'target_calls')


def drafted_counts(counts: np.ndarray) -> np.ndarray:
  """Likewise drafted tokens and target calls, `[..., 2]`."""
  return columns(counts, 'drafted', 'target_calls')


def alpha_counts(counts: np.ndarray) -> np.ndarray:
  """Likewise the overlap summed over tokens, and the tokens, `[..., 2]`."""
  return columns(counts, 'overlap', 'overlap_tokens')


def speedup_counts(counts: np.ndarray) -> np.ndarray:
  """For `intervals.ratio_of_ratios`: time per token alone over time per token speculatively.

  `[..., 4]`, seconds and tokens of either.
  """
  return columns(counts, 'autoregressive_seconds', 'autoregressive_emitted', 'seconds',
                 'emitted')


def figures(fields: Mapping[str, Any], alone: Sequence[latency.Run], runs: Sequence[latency.Run],
            steps: Sequence[step_costs.StepSeconds], overlaps: np.ndarray, *,
            samples: int) -> dict[str, Any]:
  """The measured fields of a row.

  Args:
    fields: the row's settings: gamma, tree, draft_parameters, target_parameters.
    alone: the target alone, a run for each batch of prompts; likewise `runs`.
    steps: timings of single steps, any number of them.
    overlaps: `[batches, 2]`, sums of `acceptance.alpha_counts`.
    samples: of the bootstrap.
  """
  counts = counts_by_batch(alone, runs, overlaps)
  total = counts.sum(axis=0)
  stats = [run.generation.stats for run in runs]
  reached = sum(s.reached_bg.sum(axis=0) for s in stats)
  accepted = sum(s.accepted_bg.sum(axis=0) for s in stats)
  target_seconds, draft_seconds, verify_seconds = step_costs.mean(steps)
  cost_ratio, verify_ratio = draft_seconds / target_seconds, verify_seconds / target_seconds
  tau = float(intervals.ratio(block_efficiency_counts(total)))
  drafted_per_call = float(intervals.ratio(drafted_counts(total)))
  draft_steps = steps_per_call(fields['tree'], fields['gamma'], drafted_per_call)
  interval = lambda chosen, statistic: intervals.bootstrap(
      chosen(counts)[None], statistic, samples=samples)
  per_second = lambda emitted, seconds: float(intervals.ratio(columns(total, emitted, seconds)))
  return dict(
      alpha=float(intervals.ratio(alpha_counts(total))),
      alpha_interval=interval(alpha_counts, intervals.ratio),
      block_efficiency=tau,
      block_efficiency_interval=interval(block_efficiency_counts, intervals.ratio),
      accepted_per_call=tau - 1.0,
      acceptance_by_position=acceptance.by_position(accepted, reached),
      reached_by_position=reached.tolist(), accepted_by_position=accepted.tolist(),
      cost_ratio=cost_ratio, verify_ratio=verify_ratio,
      target_step_seconds=target_seconds, draft_step_seconds=draft_seconds,
      verify_seconds=verify_seconds,
      tokens_per_second=per_second('emitted', 'seconds'),
      autoregressive_tokens_per_second=per_second('autoregressive_emitted',
                                                  'autoregressive_seconds'),
      speedup_measured=float(intervals.ratio_of_ratios(speedup_counts(total))),
      speedup_measured_interval=interval(speedup_counts, intervals.ratio_of_ratios),
      speedup_predicted=speedup_predicted(tau, draft_steps, cost_ratio, verify_ratio),
      mbsu=mbsu(tau, draft_steps, fields['draft_parameters'], fields['target_parameters']),
      drafted_per_call=drafted_per_call,
      prefill_seconds=sum(run.prefill_seconds for run in runs),
      autoregressive_prefill_seconds=sum(run.prefill_seconds for run in alone),
      counts=counts.tolist())
