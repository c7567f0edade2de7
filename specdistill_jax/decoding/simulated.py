"""Acceptance at a chosen rate: the speed of the sampler, apart from the quality of a draft.

What a draft is worth and what a cycle costs are two claims. `Simulated` fixes the first, so that
the second can be measured with weights that were never trained. Its output is meaningless: it has
no name among `rules.NAMES`, so nothing but a program that builds it can decode with it.
"""

from collections.abc import Sequence
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import judging
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling


@dataclasses.dataclass(frozen=True)
class Simulated:
  """Keeps as many tokens as chance says, and does all the work of the rule that it stands for.

  Attributes:
    acceptance: the probability that draft position g is kept, given that it was reached, one
      for each position; the models' laws have no part in it.
    rule: whose work is done. Its next token is emitted, since work without a use is dropped by
      the compiler.
  """
  acceptance: tuple[float, ...]
  rule: structs.Rule = rules.Exact()
  lossless: ClassVar[bool] = False

  def __post_init__(self):
    object.__setattr__(self, 'acceptance', tuple(self.acceptance))
    if not self.acceptance or not all(0.0 <= rate <= 1.0 for rate in self.acceptance):
      raise ValueError(f'acceptance is {self.acceptance}; it must hold one probability in '
                       '[0, 1] for each draft position')

  def __call__(self, target_log_probs_btv, proposal, key_b):
    num_drafted = proposal.tokens_bg.shape[1]
    if num_drafted != len(self.acceptance):
      raise ValueError(f'acceptance has {len(self.acceptance)} positions and the proposal '
                       f'{num_drafted} tokens; there must be one for each')
    rule_key_b, keep_key_b = sampling.split_rows(key_b, 2)
    verdict = self.rule(target_log_probs_btv, proposal, rule_key_b)
    uniform_bg = jax.vmap(lambda key: jax.random.uniform(key, (num_drafted,)))(keep_key_b)
    kept_bg = uniform_bg < jnp.asarray(self.acceptance, jnp.float32)
    return structs.Verdict(judging.leading_true(kept_bg & judging.is_drafted(proposal)),
                           verdict.next_token_b)


def block_efficiency(acceptance: Sequence[float]) -> float:
  """Expected tokens of a call (tau): 1 + a_1 + a_1 a_2 + ..., as no row ends early.

  Leviathan et al. 2023 (arXiv 2211.17192), equation 1, with a rate for each position.
  """
  total = reached = 1.0
  for rate in acceptance:
    reached *= rate
    total += reached
  return total


def even_acceptance(tau: float, gamma: int) -> tuple[float, ...]:
  """The rate, the same at all `gamma` positions, that emits `tau` tokens a call.

  Raises:
    ValueError: tau outside [1, gamma + 1], which no rate reaches.
  """
  if not 1.0 <= tau <= gamma + 1.0:
    raise ValueError(f'tau is {tau}; with gamma {gamma} it must lie in [1, {gamma + 1}]')
  low, high = 0.0, 1.0
  for _ in range(60):
    middle = (low + high) / 2
    if block_efficiency((middle,) * gamma) < tau:
      low = middle
    else:
      high = middle
  return (high,) * gamma
