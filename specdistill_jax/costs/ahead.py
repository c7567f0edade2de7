"""Compiles a program ahead of time for a slice: what it holds in memory, and its optimised text.

A compilation takes a minute and the compiler's own cache does not serve here, so results can be
kept in a folder, by the hash of what was compiled.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
import time

import jax

from specdistill_jax.costs import chips
from specdistill_jax.costs import programs

_MEMORY = dict(arguments='argument_size_in_bytes', outputs='output_size_in_bytes',
               aliased='alias_size_in_bytes', temporaries='temp_size_in_bytes',
               code='generated_code_size_in_bytes')
_UNITS = dict(K=2 ** 10, M=2 ** 20, G=2 ** 30, T=2 ** 40)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler said.

  Attributes:
    text: optimised HLO of one chip; '' if the program does not fit.
    memory: bytes of one chip by use, outputs that reuse arguments counted in both and in
      `aliased`; empty if the program does not fit.
    needs: bytes of HBM that a chip needs; at least, if the program does not fit.
    available: bytes that it has for programs, where the compiler said so: when it refused.
    seconds: of tracing and compiling, when it was compiled.
  """
  text: str
  memory: dict[str, int]
  needs: float
  available: float | None
  seconds: float

  @property
  def fits(self) -> bool:
    return bool(self.text)


def run(program: programs.Program, topology: str, keep: pathlib.Path | None = None) -> Compiled:
  """Compiles `program`, or reads the result that `keep` holds of the very same compilation.

  What cannot even hold its arguments is not compiled: they are what it `needs` at least.
  """
  started = time.perf_counter()
  held = arguments(program)
  if held > chips.CHIPS[chips.split(topology)[0]].hbm_gib * 2 ** 30:
    return Compiled('', {}, held, None, 0.0)
  lowered = program.lower()
  path = keep and keep / f'{program.name}-{_digest(lowered, topology)}.json'
  if path and path.exists():
    return Compiled(**json.loads(path.read_text()))
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needs, available = out_of_memory(str(error))
    result = Compiled('', {}, needs, available, time.perf_counter() - started)
  else:
    analysis = compiled.memory_analysis()
    memory = {name: getattr(analysis, field) for name, field in _MEMORY.items()}
    needs = sum(memory.values()) - 2 * memory['aliased']
    result = Compiled(compiled.as_text(), memory, needs, None, time.perf_counter() - started)
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(result)))
  return result


def arguments(program: programs.Program) -> int:
  """Bytes that one chip holds of the arguments, without padding to the hardware's tiles."""
  leaves = (leaf for leaf in jax.tree.leaves(program.arguments)
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf in leaves)


def _digest(lowered: jax.stages.Lowered, topology: str) -> str:
  text = '\n'.join([topology, jax.__version__, lowered.as_text()])
  return hashlib.sha256(text.encode()).hexdigest()[:16]


_REFUSALS = (
    r'Used (?P<needs>[\d.]+[KMGT]) of (?P<available>[\d.]+[KMGT]) hbm',
    r'\((?P<needs>[\d.]+[KMGT])\) exceeds available HBM \((?P<available>[\d.]+[KMGT])\)')


def out_of_memory(message: str) -> tuple[float, float]:
  """Bytes of HBM needed, and available, from the compiler's refusal.

  What is needed is a lower bound where the compiler stopped at the temporaries.

  Raises:
    RuntimeError: it refused for another reason.
  """
  found = next(filter(None, (re.search(refusal, message) for refusal in _REFUSALS)), None)
  if 'RESOURCE_EXHAUSTED' not in message or found is None:
    raise RuntimeError(message)
  number = lambda text: float(text[:-1]) * _UNITS[text[-1]]
  return number(found['needs']), number(found['available'])
