"""What the verification rules share: where a block ends, what a token was worth, what is left.

A rule sees `[b, g + 1, v]` target laws and a proposal of up to g tokens a row. The position right
after a row's last drafted token is its bonus position: nothing was drafted there, so nothing is
judged there, and the next token comes from the target's own law.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import sampling


class TokenRule(Protocol):
  """A rule that judges token by token: what a chain and a tree need to know of it.

  Attributes:
    greedy: the next token is the most probable one of its law, not a draw from it.
    corrects: a refusal takes from the target's law what the draft had of the token.
  """
  greedy: bool
  corrects: bool

  def kept(self, law: jax.Array, target: jax.Array, draft: jax.Array,
           uniform: jax.Array) -> jax.Array:
    """Whether drafted tokens are kept, bool `[...]`.

    Args:
      law: the target's law where a token was drafted, `[..., v]`.
      target: the token's log-probability under it, `[...]`.
      draft: and under the law that it was drafted from.
      uniform: a draw from [0, 1) for each.
    """

  def refused(self, target_bv: jax.Array, draft_bv: jax.Array) -> jax.Array:
    """The law, unnormalised, of what stands in for a refused token."""


def judges_trees(rule: structs.Rule) -> bool:
  """Whether a rule judges token by token, as a `TokenRule` does: a tree needs one."""
  return getattr(rule, 'kept', None) is not None


def judge_chain(rule: TokenRule, target_log_probs_btv: jax.Array, proposal: structs.Proposal,
                key_b: jax.Array) -> structs.Verdict:
  """Keeps a chain up to its first refused token."""
  accept_key_b, next_key_b = sampling.split_rows(key_b, 2)
  target_bg = token_log_probs(target_log_probs_btv[:, :-1], proposal.tokens_bg)
  draft_bg = token_log_probs(proposal.log_probs_bgv, proposal.tokens_bg)
  num_positions = proposal.tokens_bg.shape[1]
  uniform_bg = jax.vmap(lambda key: jax.random.uniform(key, (num_positions,)))(accept_key_b)
  kept_bg = rule.kept(target_log_probs_btv[:, :-1], target_bg, draft_bg, uniform_bg)
  num_accepted_b = leading_true(kept_bg & is_drafted(proposal))
  next_bv = at_position(target_log_probs_btv, num_accepted_b)
  if rule.corrects:
    rejected_bv = rule.refused(next_bv, at_position(proposal.log_probs_bgv, num_accepted_b))
    all_kept_b1 = (num_accepted_b == num_drafted(proposal))[:, None]
    next_bv = jnp.where(all_kept_b1, next_bv, rejected_bv)
  return structs.Verdict(num_accepted_b, sampling.draw(next_key_b, next_bv, rule.greedy))


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
