"""The FLOPs that a JAX program needs, from its own trace: no compiler, no chip, no copy of work.

The oracle beside `count`: matrix products of the whole program on global shapes, scans as often
as they run, the code for accelerators where CPUs have their own. What the compiler adds (layers
run twice, work done on every chip) is the difference.
"""

import math
from typing import Any

from jax.extend import core


def flops(jaxpr: Any, unknown_trips: float) -> float:
  """FLOPs of all matrix products whose result is used.

  Args:
    jaxpr: as of `jax.make_jaxpr`.
    unknown_trips: turns of loops whose end depends on data; within one, others turn once.
  """
  total = 0.0
  for equation in _used(getattr(jaxpr, 'jaxpr', jaxpr)):
    name, params = equation.primitive.name, equation.params
    if name == 'dot_general':
      contracted = params['dimension_numbers'][0][0]
      dims = equation.invars[0].aval.shape
      total += 2.0 * equation.outvars[0].aval.size * math.prod(dims[i] for i in contracted)
    elif name == 'scan':
      total += params['length'] * flops(params['jaxpr'], unknown_trips)
    elif name == 'while':
      total += unknown_trips * flops(params['body_jaxpr'], min(unknown_trips, 1))
    elif name == 'cond' and (platforms := params.get('branches_platforms')):
      total += flops(params['branches'][platforms.index(None)], unknown_trips)
    elif name == 'cond':
      total += max(flops(branch, unknown_trips) for branch in params['branches'])
    else:
      total += sum(flops(inside, unknown_trips) for inside in params.values()
                   if hasattr(inside, 'eqns') or hasattr(inside, 'jaxpr'))
  return total


def _used(jaxpr):
  """Equations that the outputs depend on: a compiler drops the others."""
  needed, kept = set(_variables(jaxpr.outvars)), []
  for equation in reversed(jaxpr.eqns):
    if needed.intersection(equation.outvars):
      kept.append(equation)
      needed.update(_variables(equation.invars))
  return kept


def _variables(atoms):
  return (atom for atom in atoms if isinstance(atom, core.Var))
