"""What the machine itself does meanwhile: CPU taken by others, and how fast memory can be read."""

from collections.abc import Callable, Iterable
import concurrent.futures
import functools
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

_CPU_MEGABYTES = 256          # larger than a last-level cache
_ACCELERATOR_MEGABYTES = 1024
_READS = 8                    # reads of one jitted call: they share its dispatch


def cpu_seconds(children: Iterable[int] = ()) -> tuple[float, float, float] | None:
  """Seconds that all cores were busy, this process and `children` used, and all cores had.

  Since boot, from Linux's counters, with a resolution of 10 ms; time stolen by a hypervisor
  counts as busy. None where there are no such counters.
  """
  path = pathlib.Path('/proc/stat')
  if not path.exists():
    return None
  tick = os.sysconf('SC_CLK_TCK')
  user, nice, system, idle, wait, irq, soft_irq, steal = (
      int(field) / tick for field in path.read_text(encoding='ascii').split()[1:9])
  busy = user + nice + system + irq + soft_irq + steal
  own = time.process_time()
  for child in children:
    fields = pathlib.Path(f'/proc/{child}/stat').read_text(encoding='utf-8').rpartition(')')[2]
    own += sum(int(field) for field in fields.split()[11:13]) / tick
  return busy, own, busy + idle + wait


def foreign_share(before: tuple[float, float, float] | None,
                  after: tuple[float, float, float] | None) -> float | None:
  """Share of all cores that neither idled nor worked for us between two `cpu_seconds`."""
  if before is None or after is None:
    return None
  busy, own, capacity = (late - early for early, late in zip(before, after))
  return max(0.0, busy - own) / capacity if capacity > 0 else None


@functools.partial(jax.jit, static_argnames=('reads',))
def _sums(array, reads):
  # Each read hangs on the one before, or the compiler would make them once.
  return jax.lax.fori_loop(0, reads, lambda _, seen: jnp.sum(jnp.abs(array - seen)) * 1e-30, 0.0)


@functools.partial(jax.jit, static_argnames=('reads',))
def _products(matrix, vector, reads):
  return jax.lax.fori_loop(0, reads, lambda _, seen: (matrix @ seen) * 1e-3, vector)


def read_probe() -> Callable[[], dict[str, float]]:
  """A function that measures memory reads, in 10^9 bytes a second, by several methods.

  `jax_sum` and `jax_matrix_vector` read one large float32 array on the default device, over and
  over in one call; on a CPU `numpy_sum` adds it up in one thread for each core. The ceiling is
  the best of them: each is a lower bound of what memory can do.
  """
  is_cpu = jax.default_backend() == 'cpu'
  side = 1 << (((_CPU_MEGABYTES if is_cpu else _ACCELERATOR_MEGABYTES) * 2 ** 18
                ).bit_length() - 1) // 2
  matrix = jax.block_until_ready(jnp.full((side, side), 1e-3, jnp.float32))
  vector = jnp.ones((side,), jnp.float32)
  methods = {
      'jax_sum': lambda: jax.block_until_ready(_sums(matrix, _READS)),
      'jax_matrix_vector': lambda: jax.block_until_ready(_products(matrix, vector, _READS)),
  }
  if is_cpu:
    threads = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    parts = np.array_split(np.asarray(matrix).reshape(-1), threads)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    methods['numpy_sum'] = lambda: [list(pool.map(np.sum, parts)) for _ in range(_READS)]
  for method in methods.values():
    method()

  def measure():
    speeds = {}
    for name, method in methods.items():
      started = time.perf_counter()
      method()
      speeds[name] = matrix.nbytes * _READS / (time.perf_counter() - started) / 1e9
    return speeds

  return measure
