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

  greedy: ClassVar[bool] = False
  corrects: ClassVar[bool] = True

  @property
  def lossless(self) -> bool:
    return self.epsilon == 1.0

  def _lenient(self, log_probs):
    return LENIENCE[self.function](log_probs, self.epsilon)

  def kept(self, law, target, draft, uniform):
    # No division, and strictly less: a token that the target forbids is never kept.
    return uniform * jnp.exp(draft) < jnp.exp(self._lenient(target))

  def refused(self, target_bv, draft_bv):
    over_bv = self._lenient(target_bv) if self.lenient_residual else target_bv
    return judging.residual_log_probs(over_bv, draft_bv)

  def __call__(self, target_log_probs_btv, proposal, key_b):
    return judging.judge_chain(self, target_log_probs_btv, proposal, key_b)


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
  draft * kept + (1 - sum draft * kept) * target. With a target at temperature 0 the test looks
  at the law at temperature 1, which is what makes it lenient, and the next token is the target's
  best.

  Attributes:
    test: a name of `THRESHOLDS`.
    epsilon: lenience, in (0, 1].
    greedy: whether the target decodes at temperature 0.
  """
  test: str
  epsilon: float
  greedy: bool
  lossless: ClassVar[bool] = False
  corrects: ClassVar[bool] = False

  @property
  def law(self) -> sampling.Sampling | None:
    return sampling.Sampling(temperature=1.0) if self.greedy else None

  def kept(self, law, target, draft, uniform):
    return (target >= THRESHOLDS[self.test](law, self.epsilon)) & (target > -jnp.inf)

  def refused(self, target_bv, draft_bv):
    return target_bv

  def __call__(self, target_log_probs_btv, proposal, key_b):
    return judging.judge_chain(self, target_log_probs_btv, proposal, key_b)
