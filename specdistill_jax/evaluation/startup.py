"""What is paid before the first token: imports and compilations."""

import collections
from collections.abc import Iterator
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys

import jax

_IMPORT = '''
import json, sys, time
started = time.perf_counter()
import specdistill_jax as sd
imported = time.perf_counter()
sd.speculate
print(json.dumps([imported - started, time.perf_counter() - imported,
                  [name for name in ('tensorflow', 'seqio') if name in sys.modules]]))
'''
_COMPILE = '/jax/core/compile/'
_BACKEND = _COMPILE + 'backend_compile_duration'


def import_seconds(times: int = 3) -> dict[str, float | list[str]]:
  """Medians over fresh interpreters: of `import specdistill_jax`, and of first using it.

  First use is looking up `sd.speculate`, which imports JAX. The interpreter's own start is not
  counted. Libraries that should have stayed out are named.
  """
  found = [json.loads(subprocess.run([sys.executable, '-c', _IMPORT], capture_output=True,
                                     text=True, check=True).stdout.splitlines()[-1])
           for _ in range(times)]
  return dict(import_seconds=statistics.median(one[0] for one in found),
              first_use_seconds=statistics.median(one[1] for one in found),
              unwanted_imports=found[0][2])


@dataclasses.dataclass
class Compilations:
  """What was compiled while watching.

  Attributes:
    count: programs that went through the backend's compiler, or out of its cache on disk.
    seconds: by function: tracing, lowering and compiling, added up.
  """
  count: int = 0
  seconds: dict[str, float] = dataclasses.field(
      default_factory=lambda: collections.defaultdict(float))


@contextlib.contextmanager
def watch_compilations() -> Iterator[Compilations]:
  """Counts and times JAX's compilations inside of the `with` block."""
  found = Compilations()

  def listen(event, duration, **details):
    if event.startswith(_COMPILE):
      found.count += event == _BACKEND
      name = str(details.get('fun_name', ''))
      found.seconds[name.removeprefix('jit(').removesuffix(')')] += duration

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
