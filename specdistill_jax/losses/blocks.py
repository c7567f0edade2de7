"""Positions of a drafted block, `[b, t, g]`: how much each counts, and what they are together.

Place `t` stands for a round of drafting, `g` for the draft position in it. A feature-level draft
is trained on several positions from every place. A standalone draft has one position a token; or
its row is cut into blocks (`cut`), as it is drafted. Text is given, so that the overlap at a
position is the acceptance rate once everything before it was accepted.

A masked position is passed over: nothing is lost there, and nothing is gained.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PerPosition = Float[Array, 'b t g']


def cut(x: jax.Array, size: int) -> jax.Array:
  """`[b, t, ...]` to `[b, t / size, size, ...]`; zeros fill the last block."""
  count = -(-x.shape[1] // size)
  x = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
  return x.reshape(x.shape[0], count, size, *x.shape[2:])


def reached(overlap_btg: PerPosition, mask_btg: PerPosition) -> PerPosition:
  """Product of the overlaps up to each position: the chance that it is accepted."""
  return jnp.cumprod(jnp.where(mask_btg > 0, overlap_btg, 1.0), axis=-1)


def end_to_end_tvd(overlap_btg: PerPosition, mask_btg: PerPosition) -> PerPosition:
  """The chance that a position is *not* accepted, all before it included (arXiv 2606.12370).

  Bebop's loss of a block is their mean, 1 - (1/g) sum_j prod_{i<=j} (1 - TVD_i); their sum is
  what the block falls short of accepting everything.
  """
  return 1 - reached(overlap_btg, mask_btg)


def decay_weights(size: int, decay: float) -> Float[Array, 'g']:
  """decay^(n - 1) at position n (Medusa, EAGLE-3 and LK: 0.8), not normalised."""
  return decay ** jnp.arange(size, dtype=jnp.float32)


def adaptive_weights(overlap_btg: PerPosition, mask_btg: PerPosition, floor: float
                     ) -> PerPosition:
  """w_n = sum_{m>=n} prod_{i<=m} ((1 - floor) overlap_i + floor), without gradient.

  D-PACE (arXiv 2605.18810): how much a smooth accepted length changes, relatively, with the
  acceptance at position n; not normalised. With the overlap where D-PACE has the draft's
  probability of the label: equal where the teacher's law is one label.
  """
  smooth_btg = (1 - floor) * jax.lax.stop_gradient(overlap_btg) + floor
  passed_btg = reached(smooth_btg, mask_btg) * mask_btg
  return jnp.flip(jnp.cumsum(jnp.flip(passed_btg, -1), axis=-1), -1)


def simulated_block_efficiency(overlap_g: Float[Array, 'g']) -> Float[Array, '']:
  """1 + sum_n prod_{i<=n} overlap_i: tokens a round, were positions independent."""
  return 1 + jnp.sum(jnp.cumprod(overlap_g))
