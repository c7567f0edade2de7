"""Which settings are worth having: none faster is as good, and the fastest within a budget.

Settings are compared at one temperature. A lossless setting has the target's quality by its law,
so that what it measures differs by chance alone; for the frontier its measured quality counts
like any other, for the budget it always lies within.
"""

from collections.abc import Sequence

from specdistill_jax.evaluation import summary as summary_lib

Summaries = Sequence[summary_lib.Summary]


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
  """Whether `one`, (tokens per second, quality), is nowhere worse than `other` and not equal."""
  return one[0] >= other[0] and one[1] >= other[1] and one != other


def _place(summary: summary_lib.Summary) -> tuple[float, float]:
  return summary.tokens_per_second, summary.quality


def target_alone(summaries: Summaries) -> tuple[float, float]:
  """Where the target without a draft stands; the same in every summary of a temperature."""
  return summaries[0].autoregressive_tokens_per_second, summaries[0].target_quality


def undominated(summaries: Summaries) -> list[summary_lib.Summary]:
  """The settings of one temperature that nothing beats in both, from the slowest.

  Empty without a quality. The target alone takes part: a setting that is slower and no better
  is not worth having.
  """
  rated = [s for s in summaries if s.quality is not None and s.target_quality is not None]
  if not rated:
    return []
  others = [*map(_place, rated), target_alone(rated)]
  kept = [s for s in rated if not any(dominates(other, _place(s)) for other in others)]
  return sorted(kept, key=lambda s: s.tokens_per_second)


def fastest_within(summaries: Summaries, max_quality_drop: float) -> summary_lib.Summary | None:
  """The fastest setting that keeps (1 - `max_quality_drop`) of the target's quality.

  None where the target alone is faster than every such setting.

  Raises:
    ValueError: `max_quality_drop` is not in [0, 1).
  """
  if not 0.0 <= max_quality_drop < 1.0:
    raise ValueError(f'max_quality_drop is {max_quality_drop}; it must lie in [0, 1), as a share '
                     "of the target's quality")
  within = [s for s in summaries if s.lossless or (
      s.quality is not None and s.target_quality is not None
      and s.quality >= (1.0 - max_quality_drop) * s.target_quality)]
  fastest = max(within, key=lambda s: s.tokens_per_second, default=None)
  return fastest if fastest is not None and fastest.speedup_measured > 1.0 else None
