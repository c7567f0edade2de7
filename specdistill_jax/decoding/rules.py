"""Verification rules: how many drafted tokens to keep, and which token comes next.

A rule is a small hashable value of type `structs.Rule`. It gets the target's law at every
position of the block: `target_log_probs_btv[:, i]` is the law after i drafted tokens. All but
`Block` judge token by token (`judging.TokenRule`), and so judge trees too. The lossless rules are
here, the others in `lossy_rules`; `for_sampling` knows both by name.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import judging
from specdistill_jax.decoding import lossy_rules
from specdistill_jax.decoding import sampling


@dataclasses.dataclass(frozen=True)
class Exact:
  """Speculative sampling (Leviathan et al. 2023, Algorithm 1; Chen et al. 2023).

  Token i is kept with probability min(1, target / draft); after the first rejection the next
  token comes from the normalised residual max(0, target - draft), after none from the target.
  Emits the target's law, whatever the drafter: min(t, d) + (1 - sum min(t, d)) * residual = t.
  """
  lossless: ClassVar[bool] = True
  greedy: ClassVar[bool] = False
  corrects: ClassVar[bool] = True

  def kept(self, law, target, draft, uniform):
    # No division, and strictly less: a token that the target forbids is never kept.
    return uniform * jnp.exp(draft) < jnp.exp(target)

  def refused(self, target_bv, draft_bv):
    return judging.residual_log_probs(target_bv, draft_bv)

  def __call__(self, target_log_probs_btv, proposal, key_b):
    return judging.judge_chain(self, target_log_probs_btv, proposal, key_b)


@dataclasses.dataclass(frozen=True)
class Greedy:
  """Exact at temperature 0, without drawing: keep while the argmaxes agree.

  Emits the target's greedy continuation, token for token. Refuses no law: with a target at a
  temperature above 0 it would emit the mode, so `for_sampling` picks it at 0 only.
  """
  lossless: ClassVar[bool] = True
  greedy: ClassVar[bool] = True
  corrects: ClassVar[bool] = False

  def kept(self, law, target, draft, uniform):
    return target >= jnp.max(law, axis=-1)

  def refused(self, target_bv, draft_bv):
    return target_bv

  def __call__(self, target_log_probs_btv, proposal, key_b):
    del key_b
    best_bt = jnp.argmax(target_log_probs_btv, axis=-1).astype(jnp.int32)
    num_accepted_b = judging.leading_true(
        (proposal.tokens_bg == best_bt[:, :-1]) & judging.is_drafted(proposal))
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
  Where a row's draft ends early takes the part of gamma: the proof is a backward induction along
  the drafted path, P(length >= i) = r_i, which starts wherever the path ends.
  """
  lossless: ClassVar[bool] = True

  def __call__(self, target_log_probs_btv, proposal, key_b):
    cut_bt, residual_bgv = block_cuts(target_log_probs_btv, proposal)
    num_cuts = cut_bt.shape[1]
    accept_key_b, next_key_b = sampling.split_rows(key_b, 2)
    uniform_bt = jax.vmap(lambda key: jax.random.uniform(key, (num_cuts,)))(accept_key_b)
    num_accepted_b = jnp.max((uniform_bt < cut_bt) * jnp.arange(num_cuts), axis=1)
    target_bv = judging.at_position(target_log_probs_btv, num_accepted_b)
    residual_bv = judging.at_position(residual_bgv, num_accepted_b)
    from_target_b1 = ((num_accepted_b == judging.num_drafted(proposal))
                      | (jnp.sum(residual_bv, axis=-1) <= 0.0))[:, None]
    next_bv = jnp.where(from_target_b1, target_bv, jnp.log(residual_bv))
    return structs.Verdict(num_accepted_b.astype(jnp.int32),
                           sampling.categorical(next_key_b, next_bv))


def block_cuts(target_log_probs_btv: jax.Array,
               proposal: structs.Proposal) -> tuple[jax.Array, jax.Array]:
  """h_i of `Block`, `[b, g + 1]`, and the unnormalised max(r_i target - draft, 0), `[b, g, v]`.

  The block is cut at the largest i whose uniform draw falls below h_i; behind a row's last
  drafted token h is 0.
  """
  ratio_bg = jnp.exp(judging.token_log_probs(target_log_probs_btv[:, :-1], proposal.tokens_bg)
                     - judging.token_log_probs(proposal.log_probs_bgv, proposal.tokens_bg))
  weights = [jnp.ones_like(ratio_bg[:, 0])]
  for index in range(ratio_bg.shape[1]):
    weights.append(jnp.where(weights[-1] > 0,
                             jnp.minimum(weights[-1] * ratio_bg[:, index], 1.0), 0.0))
  weight_bt = jnp.stack(weights, axis=1)
  residual_bgv = jnp.maximum(
      weight_bt[:, :-1, None] * jnp.exp(target_log_probs_btv[:, :-1])
      - jnp.exp(proposal.log_probs_bgv), 0.0)
  mass_bg = jnp.sum(residual_bgv, axis=-1)
  inner_bg = mass_bg / jnp.maximum(mass_bg + 1.0 - weight_bt[:, :-1], 1e-30)
  beyond_bt = jnp.arange(weight_bt.shape[1])[None] - judging.num_drafted(proposal)[:, None]
  cut_bt = jnp.where(beyond_bt < 0, jnp.pad(inner_bg, ((0, 0), (0, 1))), weight_bt)
  return jnp.where(beyond_bt > 0, 0.0, cut_bt), residual_bgv


LOSSLESS = {'exact': Exact(), 'block': Block()}
NAMES = (*LOSSLESS, *lossy_rules.LENIENCE, *lossy_rules.THRESHOLDS)


def objection(name: str, epsilon: float, target_sampling: sampling.Sampling) -> str | None:
  """Why a rule makes no sense for a target that samples so, in one sentence; None if it does."""
  greedy = target_sampling.is_greedy
  at = f'at temperature {target_sampling.temperature:g}'
  if not 0.0 < epsilon <= 1.0:
    return f'epsilon is {epsilon}; it must lie in (0, 1], and 1 is lossless'
  if name not in NAMES:
    return f'rule is {name!r}; it must be one of {", ".join(NAMES)}'
  if name in LOSSLESS and epsilon != 1.0:
    return (f'epsilon is {epsilon}, but rule {name!r} is lossless and has no leniency; '
            'it must be 1')
  if name in lossy_rules.LENIENCE and greedy and epsilon != 1.0:
    return (f'rule {name!r} with epsilon {epsilon} does nothing {at}, where a law is one-hot; '
            "use 'greedy_lenience' or 'top_k', or a temperature above 0")
  if name == 'greedy_lenience' and not greedy:
    return (f'rule {name!r} is for temperature 0, and the target samples {at}; use '
            "'linear' there")
  if name == 'typical' and (greedy or epsilon == 1.0):
    return (f'rule {name!r} with epsilon {epsilon} makes no sense {at}; it needs an epsilon '
            'below 1, since it has no lossless one, and a temperature above 0')
  if name == 'top_k' and abs(epsilon * round(1.0 / epsilon) - 1.0) > 0.025:
    return (f"rule 'top_k' keeps the target's k best tokens and k is 1 / epsilon, but epsilon "
            f'is {epsilon}; it must be 1 / 2, 1 / 3 and so on')
  if name == 'top_k' and epsilon == 1.0 and not greedy:
    return (f"rule 'top_k' with epsilon 1 would keep the target's best token alone, which is "
            f'not lossless {at}; epsilon must be 1 / 2, 1 / 3 and so on')
  return None


def for_sampling(name: str, epsilon: float, target_sampling: sampling.Sampling) -> structs.Rule:
  """The rule called `name`, for a target that samples so.

  Equal laws are equal values: at temperature 0 the lossless ones are the cheaper `Greedy`, and
  a lenience of 1 is `Exact`.

  Raises:
    ValueError: the sentence of `objection`.
  """
  if fault := objection(name, epsilon, target_sampling):
    raise ValueError(fault)
  greedy = target_sampling.is_greedy
  if greedy and (name in LOSSLESS or epsilon == 1.0):
    return Greedy()
  if name in LOSSLESS:
    return LOSSLESS[name]
  if name in lossy_rules.LENIENCE:
    return Exact() if epsilon == 1.0 else lossy_rules.Lenient(name, epsilon)
  return lossy_rules.Threshold(name, epsilon, greedy)
