"""Verification rules: how many drafted tokens to keep, and which token comes next.

A rule is a small hashable value of type `structs.Rule`. It gets the target's warped law at every
position of the block: `target_log_probs_btv[:, i]` is the law after i drafted tokens.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import sampling


def leading_true(accepted_bg: jax.Array) -> jax.Array:
  """`[b, g]` bool to int32 `[b]`: how many positions are true before the first false one."""
  return jnp.sum(jnp.cumprod(accepted_bg.astype(jnp.int32), axis=1), axis=1)


def _at_position(array_btv: jax.Array, position_b: jax.Array) -> jax.Array:
  """Picks `array_btv[b, position_b[b]]`."""
  return jnp.take_along_axis(array_btv, position_b[:, None, None], axis=1)[:, 0]


def _token_log_probs(log_probs_bgv: jax.Array, tokens_bg: jax.Array) -> jax.Array:
  return jnp.take_along_axis(log_probs_bgv, tokens_bg[..., None], axis=-1)[..., 0]


def residual_log_probs(target_bv: jax.Array, draft_bv: jax.Array) -> jax.Array:
  """log of max(0, target - draft), unnormalised; the target's own law where that is empty.

  The residual is empty only when both laws agree to rounding, and then a rejection, which has
  probability 1 - sum(min), can't have come from anywhere else than rounding.
  """
  residual_bv = jnp.maximum(jnp.exp(target_bv) - jnp.exp(draft_bv), 0.0)
  empty_b1 = jnp.sum(residual_bv, axis=-1, keepdims=True) <= 0.0
  return jnp.where(empty_b1, target_bv, jnp.log(residual_bv))


@dataclasses.dataclass(frozen=True)
class Exact:
  """Speculative sampling (Leviathan et al. 2023, Algorithm 1; Chen et al. 2023).

  Token i is kept with probability min(1, target / draft); after the first rejection the next
  token comes from the normalised residual max(0, target - draft), after none from the target.
  Emits the target's law, whatever the drafter: min(t, d) + (1 - sum min(t, d)) * residual = t.
  """
  lossless: ClassVar[bool] = True

  def __call__(self, target_log_probs_btv, proposal, key_b):
    num_drafted = proposal.tokens_bg.shape[1]
    accept_key_b, next_key_b = sampling.split_rows(key_b, 2)
    target_bg = _token_log_probs(target_log_probs_btv[:, :-1], proposal.tokens_bg)
    draft_bg = _token_log_probs(proposal.log_probs_bgv, proposal.tokens_bg)
    uniform_bg = jax.vmap(lambda key: jax.random.uniform(key, (num_drafted,)))(accept_key_b)
    # No division, and strictly less: a token that the target forbids is never kept.
    accepted_bg = uniform_bg * jnp.exp(draft_bg) < jnp.exp(target_bg)
    num_accepted_b = leading_true(accepted_bg)
    rejected_bv = residual_log_probs(
        _at_position(target_log_probs_btv, num_accepted_b),
        _at_position(proposal.log_probs_bgv, jnp.minimum(num_accepted_b, num_drafted - 1)))
    all_kept_b1 = (num_accepted_b == num_drafted)[:, None]
    next_bv = jnp.where(all_kept_b1, target_log_probs_btv[:, -1], rejected_bv)
    return structs.Verdict(num_accepted_b, sampling.categorical(next_key_b, next_bv))


@dataclasses.dataclass(frozen=True)
class Greedy:
  """Exact at temperature 0, without drawing: keep while the argmaxes agree.

  Emits the target's greedy continuation, token for token. Refuses no law: with a target at a
  temperature above 0 it would emit the mode, so `for_sampling` picks it at 0 only.
  """
  lossless: ClassVar[bool] = True

  def __call__(self, target_log_probs_btv, proposal, key_b):
    del key_b
    best_bt = jnp.argmax(target_log_probs_btv, axis=-1).astype(jnp.int32)
    num_accepted_b = leading_true(proposal.tokens_bg == best_bt[:, :-1])
    next_b = jnp.take_along_axis(best_bt, num_accepted_b[:, None], axis=1)[:, 0]
    return structs.Verdict(num_accepted_b, next_b)


@dataclasses.dataclass(frozen=True)
class Block:
  """Block verification (Sun et al. 2024, arXiv 2403.10444): judges the block, not the token.

  Lossless, never shorter in expectation than `Exact`, and the best that one drafted path
  allows. With r_0 = 1 and r_i = min(r_{i-1} target(x_i) / draft(x_i), 1), the block is cut at
  the largest i whose own uniform draw falls below
  h_i = z_i / (z_i + 1 - r_i), z_i = sum max(r_i target - draft, 0), h_gamma = r_gamma;
  the next token comes from the normalised max(r_i target - draft, 0), after all from the target.
  """
  lossless: ClassVar[bool] = True

  def __call__(self, target_log_probs_btv, proposal, key_b):
    num_drafted = proposal.tokens_bg.shape[1]
    accept_key_b, next_key_b = sampling.split_rows(key_b, 2)
    ratio_bg = jnp.exp(_token_log_probs(target_log_probs_btv[:, :-1], proposal.tokens_bg)
                       - _token_log_probs(proposal.log_probs_bgv, proposal.tokens_bg))
    weights = [jnp.ones_like(ratio_bg[:, 0])]
    for index in range(num_drafted):
      weights.append(jnp.where(weights[-1] > 0,
                               jnp.minimum(weights[-1] * ratio_bg[:, index], 1.0), 0.0))
    weight_bt = jnp.stack(weights, axis=1)
    residual_bgv = jnp.maximum(
        weight_bt[:, :-1, None] * jnp.exp(target_log_probs_btv[:, :-1])
        - jnp.exp(proposal.log_probs_bgv), 0.0)
    mass_bg = jnp.sum(residual_bgv, axis=-1)
    cut_bt = jnp.concatenate(
        [mass_bg / jnp.maximum(mass_bg + 1.0 - weight_bt[:, :-1], 1e-30), weight_bt[:, -1:]],
        axis=1)
    uniform_bt = jax.vmap(lambda key: jax.random.uniform(key, (num_drafted + 1,)))(accept_key_b)
    kept_bt = (uniform_bt < cut_bt) * jnp.arange(num_drafted + 1)
    num_accepted_b = jnp.max(kept_bt, axis=1).astype(jnp.int32)

    target_bv = _at_position(target_log_probs_btv, num_accepted_b)
    cut_residual_bv = _at_position(residual_bgv, jnp.minimum(num_accepted_b, num_drafted - 1))
    from_target_b1 = ((num_accepted_b == num_drafted)
                      | (jnp.sum(cut_residual_bv, axis=-1) <= 0.0))[:, None]
    next_bv = jnp.where(from_target_b1, target_bv, jnp.log(cut_residual_bv))
    return structs.Verdict(num_accepted_b, sampling.categorical(next_key_b, next_bv))


RULES = {'exact': Exact(), 'block': Block()}


def for_sampling(name: str, epsilon: float, target_sampling: sampling.Sampling) -> structs.Rule:
  """The rule called `name`; at temperature 0 the lossless ones are the cheaper `Greedy`."""
  if not 0.0 < epsilon <= 1.0:
    raise ValueError(f'epsilon is {epsilon}; it must lie in (0, 1], and 1 is lossless')
  if name not in RULES:
    raise ValueError(f'rule is {name!r}; it must be one of {", ".join(RULES)}')
  if epsilon != 1.0:
    raise ValueError(f'epsilon is {epsilon}, but rule {name!r} is lossless and has no leniency; '
                     'it must be 1')
  return Greedy() if target_sampling.is_greedy else RULES[name]
