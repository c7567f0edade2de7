"""The toy of the LK paper (arXiv 2602.23881, Fig. 2): one Gaussian drafts for three modes.

A draft that is too small stops short of its target, and where it stops the divergence decides.
The mixture is read off the paper's figure, which does not state it.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from specdistill_jax.losses import divergences

MODES = ((0.5, -4.0, 1.0), (0.25, 0.0, 0.5), (0.25, 6.0, 0.5))  # share, mean, standard deviation
GRID_V = np.linspace(-25.0, 25.0, 2001, dtype=np.float32)  # the laws' tokens
_STARTS = tuple((mean, width) for mean in (-4.0, -2.0, 0.0, 6.0) for width in (1.0, 4.0))


def target_logits() -> jax.Array:
  """Log-density of the mixture on the grid, `[v]`."""
  return jax.nn.logsumexp(jnp.stack(
      [jnp.log(share) + gaussian_logits(mean, width) for share, mean, width in MODES]), axis=0)


def gaussian_logits(mean, width) -> jax.Array:
  """Log-density of one Gaussian on the grid, `[v]`."""
  return -0.5 * ((GRID_V - mean) / width) ** 2 - jnp.log(width)


@functools.partial(jax.jit, static_argnames=('divergence', 'steps'))
def fit(divergence: Callable[..., jax.Array] = divergences.tvd, steps: int = 1500
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Mean, standard deviation and overlap of the Gaussian with the least divergence.

  By gradient descent from several starts, of which the best is taken.
  """
  teacher = target_logits()[None, None]
  student = lambda point: gaussian_logits(point[0], jnp.exp(point[1]))[None, None]
  loss = lambda point: divergence(student(point), teacher)[0, 0]
  rule = optax.adam(optax.cosine_decay_schedule(0.05, steps))

  def descend(point):
    def body(carry, _):
      point, state = carry
      updates, state = rule.update(jax.grad(loss)(point), state)
      return (point + updates, state), None
    (point, _), _ = jax.lax.scan(body, (point, rule.init(point)), length=steps)
    return point, loss(point)

  starts = jnp.array([(mean, jnp.log(width)) for mean, width in _STARTS])
  points, losses = jax.vmap(descend)(starts)
  best = points[jnp.argmin(losses)]
  return best[0], jnp.exp(best[1]), divergences.acceptance(student(best), teacher)[0, 0]
