"""Bootstrap intervals of ratios of sums (Efron 1979), over prompts and, if several, seeds.

The seeds of an arm answer the same prompts: prompts are resampled once for all of them, seeds
beside them (a crossed design), and counts are summed before any ratio is taken.
"""

from collections.abc import Callable

import numpy as np

Interval = tuple[float, float]


def _resample(rng: np.random.Generator, sums_kpc: np.ndarray) -> np.ndarray:
  """Sums over one bootstrap sample of seeds and prompts, `[c]`."""
  seeds, prompts, _ = sums_kpc.shape
  drawn_seeds = rng.integers(seeds, size=seeds)
  drawn_prompts = rng.integers(prompts, size=prompts)
  return sums_kpc[drawn_seeds[:, None], drawn_prompts[None, :]].sum(axis=(0, 1))


def bootstrap(counts_kpc: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *,
              samples: int, level: float = 0.95, seed: int = 0) -> Interval | None:
  """Percentile interval of a statistic of summed counts.

  Args:
    counts_kpc: `[seeds, prompts, columns]` counts or seconds of each prompt under each seed.
    statistic: columns summed over seeds and prompts, `[..., c]`, to `[...]`.
    samples: bootstrap samples.
    level: share of the samples inside the interval.
    seed: of the resampling; the same seed gives the same interval.

  Returns:
    (low, high), or None with fewer than two prompts, which say nothing about the spread.
  """
  counts_kpc = np.asarray(counts_kpc, np.float64)
  if counts_kpc.ndim != 3:
    raise ValueError(f'counts have the shape {counts_kpc.shape}; it must be [seeds, prompts, '
                     'columns]')
  if counts_kpc.shape[1] < 2:
    return None
  rng = np.random.default_rng(seed)
  sums_rc = np.stack([_resample(rng, counts_kpc) for _ in range(samples)])
  with np.errstate(divide='ignore', invalid='ignore'):
    values_r = statistic(sums_rc)
  values_r = values_r[np.isfinite(values_r)]
  if not values_r.size:
    return None
  tail = 50.0 * (1.0 - level)
  low, high = np.percentile(values_r, [tail, 100.0 - tail])
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
