"""Competitors in rounds: each once a round, compared within rounds, disturbed rounds left out.

A machine's speed drifts by more than the differences of interest. Within one round it hardly
does, so a ratio is taken in every round and its median reported; which competitor goes first
changes from round to round.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from specdistill_jax.evaluation import machine

MOST_FOREIGN = 0.05  # share of the cores that others may take in a round
FEWEST_ROUNDS = 3    # undisturbed ones; with fewer, all rounds count and the result says so


@dataclasses.dataclass(frozen=True)
class Round:
  """Results by competitor, and the share of all cores that other processes took meanwhile."""
  results: dict[str, Any]
  foreign_share: float | None


def play(competitors: Mapping[str, Callable[[], Any]], rounds: int, *,
         children: Iterable[int] = (),
         progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> list[Round]:
  """Runs every competitor once a round, warm ones only: this warms up nothing.

  Args:
    children: ids of processes that work for competitors.
    progress: wraps the loop over rounds.
  """
  names, played = list(competitors), []
  children = tuple(children)
  for index in progress(range(rounds)):
    first = index % len(names)
    before = machine.cpu_seconds(children)
    results = {name: competitors[name]() for name in names[first:] + names[:first]}
    played.append(Round(results, machine.foreign_share(before, machine.cpu_seconds(children))))
  return played


def undisturbed(rounds: Sequence[Round]) -> tuple[list[Round], bool]:
  """The rounds to judge by, and whether they are undisturbed ones.

  Where the share of others is unknown, rounds count as disturbed: nobody vouches for them.
  """
  quiet = [one for one in rounds
           if one.foreign_share is not None and one.foreign_share <= MOST_FOREIGN]
  return (quiet, True) if len(quiet) >= FEWEST_ROUNDS else (list(rounds), False)


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
  """A 95 % confidence interval of the median by order statistics, for values of any law.

  Between the k-th smallest and the k-th largest of n lies the median with probability
  1 - 2 P(Binomial(n, 1/2) < k) (David & Nagaraja, Order Statistics, 7.1); the largest k that
  keeps 95 % is taken. None where even the extremes don't, as with fewer than six.
  """
  n, below, k = len(values), 0.0, 0
  while k < n and 1.0 - 2.0 * (below + math.comb(n, k) / 2 ** n) >= 0.95:
    below += math.comb(n, k) / 2 ** n
    k += 1
  if k == 0:
    return None
  ordered = sorted(values)
  return float(ordered[k - 1]), float(ordered[n - k])


def ratio(rounds: Sequence[Round], numerator: Callable[[Round], float],
          denominator: Callable[[Round], float]) -> tuple[float, tuple[float, float] | None]:
  """Median and interval of a ratio that is taken within each round."""
  values = [numerator(one) / denominator(one) for one in rounds]
  return float(np.median(values)), median_interval(values)


def median(rounds: Sequence[Round], value: Callable[[Round], float]) -> float:
  return float(np.median([value(one) for one in rounds]))
