"""Lossy verification rules: more drafted tokens kept, a law that is no longer the target's.

Each docstring gives the law that one position emits, `target` and `draft` being the two laws
there after the same warping, and `draft` one-hot for greedy drafts. At the bonus position all
emit the target's law. What a token is followed by depends on where in its block it stood, so the
law of a text is that of the cycles, not a product of one next-token law (Zhou et al. 2023,
arXiv 2310.08461, call `epsilon` lenience; 1 is lossless, smaller is more lenient).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import judging
from specdistill_jax.decoding import sampling

LENIENCE = {
    'linear': lambda log_probs, epsilon: log_probs - math.log(epsilon),
    'square': lambda log_probs, epsilon: log_probs - 2.0 * math.log(epsilon),
    'exponential': lambda log_probs, epsilon: epsilon * log_probs,
}


@dataclasses.dataclass(frozen=True)
class Lenient:
  """Speculative sampling with a target made lenient (Zhou et al. 2023, section on lossy SD).

  A token is kept with probability min(1, f(target) / draft), where f(p) is p / epsilon
  (`linear`: Leviathan et al. 2023, A.5), p / epsilon^2 (`square`) or p^epsilon (`exponential`).
  One position emits min(draft, f) + (1 - sum min(draft, f)) * residual, the residual being
  max(0, target - draft), normalised: Google's notebook on speculative cascades keeps this strict
  one whatever the lenience, and the paper's own is not known. `lenient_residual` takes
  max(0, f - draft) instead. Neither is empty where a token can be refused: there draft > f >=
  target. At epsilon 1 this is `rules.Exact`, draw for draw.

  Attributes:
    function: a name of `LENIENCE`.
    epsilon: lenience, in (0, 1].
    lenient_residual: correct from the lenient law rather than from the target's.
  """
  function: str
  epsilon: float
  lenient_residual: bool = False

  @property
  def lossless(self) -> bool:
    return self.epsilon == 1.0

  def __call__(self, target_log_probs_btv, proposal, key_b):
    accept_key_b, next_key_b = sampling.split_rows(key_b, 2)
    lenient = lambda log_probs: LENIENCE[self.function](log_probs, self.epsilon)
    target_bg = judging.token_log_probs(target_log_probs_btv[:, :-1], proposal.tokens_bg)
    draft_bg = judging.token_log_probs(proposal.log_probs_bgv, proposal.tokens_bg)
    num_positions = proposal.tokens_bg.shape[1]
    uniform_bg = jax.vmap(lambda key: jax.random.uniform(key, (num_positions,)))(accept_key_b)
    # No division, and strictly less: a token that the target forbids is never kept.
    kept_bg = uniform_bg * jnp.exp(draft_bg) < jnp.exp(lenient(target_bg))
    num_accepted_b = judging.leading_true(kept_bg & judging.is_drafted(proposal))
    target_bv = judging.at_position(target_log_probs_btv, num_accepted_b)
    rejected_bv = judging.residual_log_probs(
        lenient(target_bv) if self.lenient_residual else target_bv,
        judging.at_position(proposal.log_probs_bgv, num_accepted_b))
    all_kept_b1 = (num_accepted_b == judging.num_drafted(proposal))[:, None]
    next_bv = jnp.where(all_kept_b1, target_bv, rejected_bv)
    return structs.Verdict(num_accepted_b, sampling.categorical(next_key_b, next_bv))


def _share_of_best(log_probs_btv: jax.Array, epsilon: float) -> jax.Array:
  return jnp.max(log_probs_btv, axis=-1) + math.log(epsilon)


def _typical(log_probs_btv: jax.Array, epsilon: float) -> jax.Array:
  probs_btv = jnp.exp(log_probs_btv)
  entropy_bt = -jnp.sum(jnp.where(probs_btv > 0, probs_btv * log_probs_btv, 0.0), axis=-1)
  return jnp.minimum(math.log(epsilon), 0.5 * math.log(epsilon) - entropy_bt)


def _kth_best(log_probs_btv: jax.Array, epsilon: float) -> jax.Array:
  return sampling.greatest_threshold(log_probs_btv, 1.0, round(1.0 / epsilon))


# The least log-probability that a kept token has under the target: `[b, t, v] -> [b, t]`.
THRESHOLDS = {
    'greedy_lenience': _share_of_best,
    'typical': _typical,
    'top_k': _kth_best,
}


@dataclasses.dataclass(frozen=True)
class Threshold:
  """Keeps a drafted token that the target gives enough probability, whatever the draft gave it.

  Kept from a probability of epsilon times that of the target's best token (`greedy_lenience`:
  Leviathan et al. 2023, A.5), of min(epsilon, sqrt(epsilon) exp(-entropy)), in nats (`typical`:
  Medusa, Cai et al. 2024, arXiv 2401.10774, with its recommended delta), or of the k-th best
  token, ties included (`top_k`, k = 1 / epsilon). A token of probability zero never is. The next
  token comes from the target's own law, not from a residual: one position emits
  draft * kept + (1 - sum draft * kept) * target. With a target at temperature 0 the test looks at the law at temperature 1, which is
  what makes it lenient, and the next token is the target's best.

  Attributes:
    test: a name of `THRESHOLDS`.
    epsilon: lenience, in (0, 1].
    greedy: whether the target decodes at temperature 0.
  """
  test: str
  epsilon: float
  greedy: bool
  lossless: ClassVar[bool] = False

  @property
  def law(self) -> sampling.Sampling | None:
    return sampling.Sampling(temperature=1.0) if self.greedy else None

  def __call__(self, target_log_probs_btv, proposal, key_b):
    judged_bgv = target_log_probs_btv[:, :-1]
    target_bg = judging.token_log_probs(judged_bgv, proposal.tokens_bg)
    kept_bg = ((target_bg >= THRESHOLDS[self.test](judged_bgv, self.epsilon))
               & (target_bg > -jnp.inf))
    num_accepted_b = judging.leading_true(kept_bg & judging.is_drafted(proposal))
    next_bv = judging.at_position(target_log_probs_btv, num_accepted_b)
    if self.greedy:
      return structs.Verdict(num_accepted_b, jnp.argmax(next_bv, axis=-1).astype(jnp.int32))
    return structs.Verdict(num_accepted_b, sampling.categorical(key_b, next_bv))
