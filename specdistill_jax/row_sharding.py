"""Sums over rows that are spread over devices, a part of them at a time, by weights that all need.

The loops of `losses.chunked` run under `over_rows`, and a model's head reads its features by
`for_head`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
import numpy as np

from specdistill_jax import sharding


def for_head(x_btd: jax.Array) -> jax.Array:
  """Features as a head reads them: under `over_rows` on every device that holds a part of it.

  Their gradient goes back to where the rows are. Elsewhere they stay where they are.
  """
  axes = jax.sharding.get_abstract_mesh().manual_axes
  return _sent(x_btd) if 'data' in axes and 'fsdp' not in axes else x_btd


@jax.custom_vjp
def _sent(x_btd):
  return sharding.constrain(x_btd, 'btd')


def _sent_back(_, grad_btd):
  mesh = jax.sharding.get_abstract_mesh()
  return (jax.lax.with_sharding_constraint(
      grad_btd, PartitionSpec(*sharding.fitted('btd', grad_btd.shape, dict(b='fsdp'), mesh))),)


_sent.defvjp(lambda x_btd: (_sent(x_btd), None), _sent_back)


def over_rows(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function(whole, rows) -> (sums, of_rows)`, with rows and heads where they cost least.

  Left to the compiler, a loop over parts of the rows gathers the heads in each turn. `whole` is
  what all rows need: heads; `sums` what is added over rows. Of two ways that is taken which moves
  less. Either each device takes its own rows alone, for which the heads are gathered whole, once,
  and whose sums are added up once. Or heads stay spread over fsdp by their vocabulary, and each
  part's rows go to all of them: then there is memory for neither whole heads nor their gradients.
  Without a mesh in context, and where the rows don't divide, it is the function itself.
  """
  def spread(whole, rows):
    mesh = jax.sharding.get_abstract_mesh()
    ways = 1 if mesh.empty else sharding.rows_per_step(mesh)
    if ways == 1 or jax.tree.leaves(rows)[0].shape[0] % ways:
      return function(whole, rows)
    by_vocabulary = _splits_vocabulary(whole, rows, mesh)
    manual = ('data',) if by_vocabulary else sharding.ROWS
    added_over = tuple(axis for axis in manual if mesh.shape[axis] > 1)

    def layout(x):
      # Of a head's gradient each device keeps a part; figures are whole, for the host to read.
      scattered = not by_vocabulary and x.ndim > 1 and x.shape[-1] % mesh.shape['fsdp'] == 0
      return PartitionSpec(*[None] * (x.ndim - 1), 'fsdp') if scattered else PartitionSpec()

    def add_up(x, spec):
      if 'fsdp' not in spec:
        return jax.lax.psum(x, added_over) if added_over else x
      x = jax.lax.psum_scatter(x, 'fsdp', scatter_dimension=x.ndim - 1, tiled=True)
      return jax.lax.psum(x, 'data')

    layouts = jax.tree.map(layout, jax.eval_shape(function, whole, rows)[0])

    def local(whole, rows):
      if by_vocabulary:
        whole = jax.tree.map(lambda x: _by_vocabulary(x, mesh), whole)
      sums, of_rows = function(whole, rows)
      return jax.tree.map(add_up, sums, layouts), of_rows

    return jax.shard_map(
        local, in_specs=(PartitionSpec(), PartitionSpec(manual)),
        out_specs=(layouts, PartitionSpec(manual)), axis_names=set(manual), check_vma=False)(
            whole, rows)
  return spread


def _vocabulary_axis(x) -> int | None:
  """Of a head's weights by far the longest; of others none."""
  if np.ndim(x) < 2:
    return None
  *_, second, longest = sorted(x.shape)
  return x.shape.index(longest) if longest >= 2 * second else None


def _by_vocabulary(x, mesh):
  """Weights of a head, split by vocabulary; what is none, whole."""
  axis = _vocabulary_axis(x)
  letters = ['.'] * np.ndim(x)
  if axis is not None:
    letters[axis] = 'v'
  return jax.lax.with_sharding_constraint(
      x, PartitionSpec(*sharding.fitted(letters, np.shape(x), sharding.BY_VOCABULARY, mesh)))


def _splits_vocabulary(whole, rows, mesh) -> bool:
  """Whether moving rows, there and back, costs less than moving heads, and they divide."""
  heads = [x for x in jax.tree.leaves(whole) if _vocabulary_axis(x) is not None]
  ways = mesh.shape['fsdp'] * mesh.shape['tensor']
  if mesh.shape['fsdp'] == 1 or not heads or any(
      x.shape[_vocabulary_axis(x)] % ways for x in heads):
    return False
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  return size(rows) / mesh.shape['data'] < 2 * size(heads)
