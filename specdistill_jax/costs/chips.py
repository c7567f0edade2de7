"""Published rates of TPU chips, and the slices that the compiler knows by name.

bf16 peak, HBM and interconnect: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; v4's links are those
of Jouppi et al. 2023 (arXiv 2304.01433, Table 4). Nothing here was measured.
"""

import dataclasses
import math
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
  """Rates of one chip.

  Attributes:
    flops: peak of bf16 matrix products, per second.
    hbm_gib: capacity, GiB.
    hbm_bandwidth: bytes per second.
    link_bandwidth: bytes per second of one ICI port, one way.
  """
  flops: float
  hbm_gib: float
  hbm_bandwidth: float
  link_bandwidth: float

  @property
  def chip_bandwidth(self) -> float:
    """Of the chip's own memory, bytes per second.

    About 22 times HBM's, says "How to Scale Your Model" (jax-ml.github.io/scaling-book) of VMEM;
    v4 also keeps arrays in its slower CMEM, whose rate is not published.
    """
    return 22 * self.hbm_bandwidth

  @property
  def ring_bandwidth(self) -> float:
    """What a chip sends on a ring along one torus axis: both ways, one port each."""
    return 2 * self.link_bandwidth


CHIPS = {
    'v4': Chip(275e12, 32, 1200e9, 50e9),    # six links of 50 GB/s
    'v5e': Chip(197e12, 16, 819e9, 50e9),    # four: 400 GB/s, both ways together
    'v5p': Chip(459e12, 95, 2765e9, 100e9),  # six: 4,800 Gbit/s
    'v6e': Chip(918e12, 32, 1638e9, 100e9),  # four: 800 GB/s, both ways together
}
# From small to large, as `--sweep` tries them.
SLICES = {
    'v4': ('1x1x1', '2x2x1', '2x2x2', '2x2x4', '4x4x4'),
    'v5e': ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
    'v5p': ('1x1x1', '2x2x1', '2x2x2', '2x2x4', '4x4x4'),
    'v6e': ('1x1', '2x2', '2x4', '4x4', '16x16'),
}


def split(topology: str) -> tuple[str, str]:
  """'v5e:4x4' to the kind of chip and the shape of the slice.

  Raises:
    ValueError: no such chip.
  """
  kind, _, shape = topology.partition(':')
  if kind not in CHIPS or not shape:
    raise ValueError(f'topology is {topology!r}; it must be one of {", ".join(CHIPS)} and a '
                     "shape, as in 'v5e:4x4' or 'v4:2x2x4'")
  return kind, shape


def count(topology: str) -> int:
  """Chips of a slice."""
  return math.prod(int(size) for size in split(topology)[1].split('x'))


def devices(topology: str) -> list[Any]:
  """The slice's chips as the ahead-of-time compiler takes them; no TPU is needed, libtpu is.

  Raises:
    RuntimeError: libtpu is not installed.
    ValueError: the compiler does not know the slice.
  """
  from jax.experimental import topologies
  kind, _ = split(topology)
  # A v4 chip has two cores, which programs use as one device.
  options = dict(chip_config_name='megacore') if kind == 'v4' else {}
  if count(topology) == 1:  # a host has four, unless told
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    return list(topologies.get_topology_desc(
        platform='tpu', topology_name=topology, **options).devices)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f'the compiler refuses the slice {topology}; it must be one such as '
                     f'{split(topology)[0]}:{SLICES[split(topology)[0]][-1]} ({error})') from error
