"""What the verification rules share: where a block ends, what a token was worth, what is left.

A rule sees `[b, g + 1, v]` target laws and a proposal of up to g tokens a row. The position right
after a row's last drafted token is its bonus position: nothing was drafted there, so nothing is
judged there, and the next token comes from the target's own law.
"""

import jax
import jax.numpy as jnp

from specdistill_jax import structs


def num_drafted(proposal: structs.Proposal) -> jax.Array:
  """Tokens that each row drafted, int32 `[b]`."""
  b, g = proposal.tokens_bg.shape
  if proposal.num_drafted_b is None:
    return jnp.full((b,), g, jnp.int32)
  return proposal.num_drafted_b


def is_drafted(proposal: structs.Proposal) -> jax.Array:
  """Whether a position of the block holds a drafted token, bool `[b, g]`."""
  return jnp.arange(proposal.tokens_bg.shape[1])[None] < num_drafted(proposal)[:, None]


def leading_true(accepted_bg: jax.Array) -> jax.Array:
  """`[b, g]` bool to int32 `[b]`: how many positions are true before the first false one."""
  return jnp.sum(jnp.cumprod(accepted_bg.astype(jnp.int32), axis=1), axis=1)


def at_position(array_btv: jax.Array, position_b: jax.Array) -> jax.Array:
  """Picks `array_btv[b, position_b[b]]`; past the last position, the last one."""
  position_b = jnp.minimum(position_b, array_btv.shape[1] - 1)
  return jnp.take_along_axis(array_btv, position_b[:, None, None], axis=1)[:, 0]


def token_log_probs(log_probs_bgv: jax.Array, tokens_bg: jax.Array) -> jax.Array:
  """The log-probability of each drafted token, `[b, g]`."""
  return jnp.take_along_axis(log_probs_bgv, tokens_bg[..., None], axis=-1)[..., 0]


def residual_log_probs(target_bv: jax.Array, draft_bv: jax.Array) -> jax.Array:
  """log of max(0, target - draft), unnormalised; the target's own law where that is empty.

  The residual is empty only when both laws agree to rounding, and then a rejection, which has
  probability 1 - sum(min), can't have come from anywhere else than rounding.
  """
  residual_bv = jnp.maximum(jnp.exp(target_bv) - jnp.exp(draft_bv), 0.0)
  empty_b1 = jnp.sum(residual_bv, axis=-1, keepdims=True) <= 0.0
  return jnp.where(empty_b1, target_bv, jnp.log(residual_bv))
