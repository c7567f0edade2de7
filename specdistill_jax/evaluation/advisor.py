"""Which draft length to take, from what one run measured: no decoding at other lengths needed.

Of the acceptance by position a_i (given that position i was reached), the tokens a call emits at
draft length gamma are tau = 1 + sum_{i <= gamma} prod_{j <= i} a_j, and the speed-up is
tau / (gamma c + v(gamma)) (Leviathan et al. 2023, Theorem 3.8, with a verification that costs).

v is measured at the lengths that were run; between them it is interpolated linearly, from
v(0) = 1, and beyond the longest nothing is said. tau leaves out that a row's end cuts blocks, so
it lies a little above what rows of few tokens show.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Point:
  """What one draft length promises; `verify_measured` is False where v was interpolated."""
  gamma: int
  block_efficiency: float
  speedup: float
  verify_measured: bool


def curve(acceptance_by_position: Sequence[float | None], cost_ratio: float,
          verify_ratios: Mapping[int, float]) -> list[Point]:
  """Predicted block efficiency and speed-up for each draft length up to the longest measured.

  Args:
    acceptance_by_position: of the longest draft; None from the first position that was never
      reached, where the curve ends.
    cost_ratio: c, one draft step over one target step.
    verify_ratios: v by draft length, as measured.

  Raises:
    ValueError: nothing was measured.
  """
  if not verify_ratios or not acceptance_by_position:
    raise ValueError('no draft length was measured; give acceptance and verify_ratios of one')
  measured = {0: 1.0, **verify_ratios}
  gammas = sorted(measured)
  points, tau, reaching = [], 1.0, 1.0
  for gamma, kept in enumerate(acceptance_by_position, start=1):
    if kept is None or gamma > gammas[-1]:
      break
    reaching *= kept
    tau += reaching
    verify = float(np.interp(gamma, gammas, [measured[g] for g in gammas]))
    points.append(Point(gamma, tau, tau / (gamma * cost_ratio + verify), gamma in verify_ratios))
  return points


def best(points: Sequence[Point]) -> Point | None:
  """The fastest length of a curve, the shorter of equals; None if every one is slower than none."""
  fastest = max(points, key=lambda point: point.speedup, default=None)
  return fastest if fastest is not None and fastest.speedup > 1.0 else None
