"""A chain, drafted token by token, whatever a draft carries from one token to the next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specdistill_jax.decoding import sampling as sampling_lib

# Token `[b]` and what is carried -> logits `[b, v]` of the next token, and what is carried on.
Feed = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


class Chain(NamedTuple):
  """What was drafted.

  Attributes:
    tokens_bg: int32.
    log_probs_bgv: the laws that they were drawn from.
    num_drafted_b: of each row; None if it is always gamma.
    carried: behind the last token that was fed, the last but one of a whole chain.
  """
  tokens_bg: jax.Array
  log_probs_bgv: jax.Array
  num_drafted_b: jax.Array | None
  carried: Any


def draft(feed: Feed, key_gb: jax.Array, logits_bv: jax.Array, carried: Any, *,
          sampling: sampling_lib.Sampling, min_confidence: float, done_b: jax.Array) -> Chain:
  """Drafts as many tokens a row as there are keys, or fewer.

  Args:
    key_gb: of each draw.
    logits_bv: of the first token.
    sampling: the law drafted from.
    min_confidence: a row's draft ends with the first token whose law gave no token as much
      probability, at temperature 1; 0 always drafts all. The token itself is still drafted, its
      law being paid for. The law alone decides, before its token is drawn: a draft that dropped
      tokens for what they turned out to be would bias what is judged.
    done_b: rows that need no draft.
  """
  if min_confidence:
    return _while_confident(feed, key_gb, logits_bv, carried, sampling, min_confidence, done_b)
  tokens, log_probs = [], []
  for index in range(len(key_gb)):
    if index:
      logits_bv, carried = feed(tokens[-1], carried)
    token_b, log_probs_bv = _draw(key_gb[index], logits_bv, sampling)
    tokens.append(token_b)
    log_probs.append(log_probs_bv)
  return Chain(jnp.stack(tokens, axis=1), jnp.stack(log_probs, axis=1), None, carried)


def _while_confident(feed, key_gb, logits_bv, carried, sampling, min_confidence, done_b) -> Chain:
  """Drafts until no unfinished row goes on: steps that no row needs are not run.

  A row that has stopped is fed on with the others; whoever commits forgets what it didn't keep.
  """
  gamma, b = len(key_gb), len(logits_bv)
  is_confident = lambda logits_bv: (
      jnp.max(jax.nn.softmax(logits_bv, axis=-1), axis=-1) >= min_confidence)
  token_b, log_probs_bv = _draw(key_gb[0], logits_bv, sampling)
  tokens_gb = jnp.zeros((gamma, b), jnp.int32).at[0].set(token_b)
  log_probs_gbv = jnp.zeros((gamma, *log_probs_bv.shape)).at[0].set(log_probs_bv)
  goes_on_b = ~done_b & is_confident(logits_bv)

  def body(state):
    index, goes_on_b, drafted_b, tokens_gb, log_probs_gbv, carried = state
    logits_bv, carried = feed(tokens_gb[index - 1], carried)
    token_b, log_probs_bv = _draw(key_gb[index], logits_bv, sampling)
    return (index + 1, goes_on_b & is_confident(logits_bv),
            drafted_b + goes_on_b.astype(jnp.int32), tokens_gb.at[index].set(token_b),
            log_probs_gbv.at[index].set(log_probs_bv), carried)

  _, _, drafted_b, tokens_gb, log_probs_gbv, carried = jax.lax.while_loop(
      lambda state: (state[0] < gamma) & jnp.any(state[1]), body,
      (jnp.int32(1), goes_on_b, jnp.ones((b,), jnp.int32), tokens_gb, log_probs_gbv, carried))
  return Chain(tokens_gb.T, jnp.swapaxes(log_probs_gbv, 0, 1), drafted_b, carried)


def _draw(key_b, logits_bv, sampling) -> tuple[jax.Array, jax.Array]:
  """A token a row, and the law that it was drawn from."""
  log_probs_bv = sampling_lib.warp(logits_bv, sampling)
  return sampling_lib.draw(key_b, log_probs_bv, sampling.is_greedy), log_probs_bv
