"""Bootstrap intervals of ratios of sums (Efron 1979), over prompts and, if several, seeds.

The seeds of an arm answer the same prompts: prompts are resampled once for all of them, seeds
beside them (a crossed design), and counts are summed before any ratio is taken.
"""

from collections.abc import Callable, Sequence

import numpy as np

Interval = tuple[float, float]
_MOST_NUMBERS = 1 << 20  # that are drawn at once: 8 MiB


def _times_drawn(rng: np.random.Generator, samples: int, count: int) -> np.ndarray:
  """How often each of `count` is among as many draws with replacement, `[samples, count]`."""
  drawn = rng.integers(count, size=(samples, count)) + count * np.arange(samples)[:, None]
  return np.bincount(drawn.ravel(), minlength=samples * count).reshape(samples, count)


def _resampled(rng: np.random.Generator, arms: Sequence[np.ndarray], samples: int) -> np.ndarray:
  """Sums over each bootstrap sample of seeds and prompts, `[samples, columns of all arms]`."""
  prompts = arms[0].shape[1]
  parts = []
  at_once = max(1, _MOST_NUMBERS // prompts)
  for begin in range(0, samples, at_once):
    count = min(at_once, samples - begin)
    seeds = {len(arms[0]): _times_drawn(rng, count, len(arms[0])), 1: np.ones((count, 1))}
    times_rp = _times_drawn(rng, count, prompts).astype(np.float64)
    for arm in arms[1:]:
      if len(arm) not in seeds:
        seeds[len(arm)] = _times_drawn(rng, count, len(arm))
    # One by one, so that equal columns have equal sums to the bit.
    parts.append(np.stack([
        np.sum(seeds[len(arm)] * (times_rp @ arm[..., column].T), axis=1)
        for arm in arms for column in range(arm.shape[-1])], axis=-1))
  return np.concatenate(parts)


def bootstrap(counts_kpc: np.ndarray | Sequence[np.ndarray],
              statistic: Callable[[np.ndarray], np.ndarray], *, samples: int,
              seed: int = 0) -> Interval | None:
  """95 % percentile interval of a statistic of summed counts.

  Args:
    counts_kpc: `[seeds, prompts, columns]` counts or seconds of each prompt under each seed; or of
      several arms on the same prompts. Arms of as many seeds are paired by seed, others have
      their own.
    statistic: columns of all arms summed over seeds and prompts, `[..., c]`, to `[...]`.
    samples: bootstrap samples.
    seed: of the resampling; the same seed gives the same interval.

  Returns:
    (low, high), or None with fewer than two prompts, which say nothing about the spread.
  """
  arms = counts_kpc if isinstance(counts_kpc, (list, tuple)) else [counts_kpc]
  arms = [np.asarray(arm, np.float64) for arm in arms]
  for arm in arms:
    if arm.ndim != 3 or arm.shape[1] != arms[0].shape[1]:
      raise ValueError(f'counts have the shape {arm.shape}; it must be [seeds, prompts, columns], '
                       f'of {arms[0].shape[1]} prompts')
  if arms[0].shape[1] < 2:
    return None
  rng = np.random.default_rng(seed)
  sums_rc = _resampled(rng, arms, samples)
  with np.errstate(divide='ignore', invalid='ignore'):
    values_r = statistic(sums_rc)
  values_r = values_r[np.isfinite(values_r)]
  if not values_r.size:
    return None
  low, high = np.percentile(values_r, [2.5, 97.5])
  return float(low), float(high)


def ratio(sums_c: np.ndarray) -> np.ndarray:
  """First column over the second."""
  return sums_c[..., 0] / sums_c[..., 1]


def ratio_of_ratios(sums_c: np.ndarray) -> np.ndarray:
  """(column 0 / column 1) / (column 2 / column 3), as of two times per token."""
  return sums_c[..., 0] * sums_c[..., 3] / (sums_c[..., 1] * sums_c[..., 2])


def wilson(share: float, count: float, z: float = 1.96) -> Interval | None:
  """Interval of a share of `count` independent trials (Wilson 1927); None without a trial."""
  if not count:
    return None
  middle = (share + z * z / (2 * count)) / (1 + z * z / count)
  half = z / (1 + z * z / count) * np.sqrt(
      share * (1 - share) / count + z * z / (4 * count * count))
  return float(middle - half), float(middle + half)
