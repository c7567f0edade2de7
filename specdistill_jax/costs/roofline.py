"""From counted operations and a chip's rates to a time: a lower bound, and what bounds it.

A kernel takes the longest of its products at peak rate, its bytes at full HBM bandwidth and those
at the bandwidth of the chip's own memory, and kernels run one after the other; collectives run
beside them, one after the other on one torus axis. The step takes the longer of the two.
Latencies, padding and work that is no matrix product are left out, so a chip can only be slower.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from specdistill_jax.costs import chips
from specdistill_jax.costs import count


@dataclasses.dataclass(frozen=True)
class Cost:
  """Sums over operations, of one chip.

  Attributes:
    flops: of matrix products.
    hbm_bytes: read and written by kernels.
    wire_bytes: sent.
    kernel_seconds: all kernels, one after the other.
    network_seconds: all collectives, one after the other.
    collectives: by kind and number of chips joined: times, bytes sent, seconds.
  """
  flops: float
  hbm_bytes: float
  wire_bytes: float
  kernel_seconds: float
  network_seconds: float
  collectives: tuple[dict[str, Any], ...]

  @property
  def seconds(self) -> float:
    return max(self.kernel_seconds, self.network_seconds)

  @property
  def num_collectives(self) -> float:
    """Each waits a latency that is not counted."""
    return sum(joined['times'] for joined in self.collectives)

  @property
  def bound(self) -> str:
    return 'network' if self.network_seconds > self.kernel_seconds else 'kernels'


def cost(operations: Sequence[count.Operation], chip: chips.Chip) -> Cost:
  total = lambda name: sum(getattr(o, name) * o.times for o in operations)
  kernels = sum(o.times * max(o.flops / chip.flops, o.hbm_bytes / chip.hbm_bandwidth,
                              o.chip_bytes / chip.chip_bandwidth) for o in operations)
  groups = {}
  for o in operations:
    if o.kind and o.group > 1:
      found = groups.setdefault((o.kind, o.group), dict(times=0.0, wire_bytes=0.0))
      found['times'] += o.times
      found['wire_bytes'] += o.times * o.wire_bytes
  collectives = tuple(
      dict(kind=kind, chips=group, **found, seconds=found['wire_bytes'] / chip.ring_bandwidth)
      for (kind, group), found in sorted(groups.items(), key=lambda x: -x[1]['wire_bytes']))
  return Cost(flops=total('flops'), hbm_bytes=total('hbm_bytes'), wire_bytes=total('wire_bytes'),
              kernel_seconds=kernels,
              network_seconds=sum(c['seconds'] for c in collectives), collectives=collectives)


def block_efficiency(alpha: float, gamma: int) -> float:
  """Tokens a target call if each draft token is accepted with probability alpha.

  (1 - alpha^(gamma + 1)) / (1 - alpha), Leviathan et al. 2023 (arXiv 2211.17192), Eq. 1.
  """
  return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)
