"""The emitted tokens follow the target's law: enumerated exactly, then chi-square.

50,000 jitted samples a case, p-values corrected for their number; wrong rules and a wrong
drafter are shown to fail the same test. `python tests/laws.py` runs the full grid of rules,
draft modes and warps on a million samples each.
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laws
from laws import Case
from specdistill_jax import structs
from specdistill_jax.decoding import judging
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
import tables

# name: (rule, case). Each draft, length, warp and draft mode occurs with each rule or length.
CASES = {
    'plain': ('exact', Case()),
    'gamma1': ('exact', Case(gamma=1)),
    'beyond_budget': ('exact', Case('similar', gamma=7, prompt=(4, 2))),
    'one_token_prompt': ('exact', Case('similar', gamma=2, prompt=(3,))),
    'cold': ('exact', Case('overconfident', temperature=0.6, prompt=(2, 2, 4))),
    'cold_gamma1': ('exact', Case('similar', gamma=1, temperature=0.6, prompt=(2, 2, 4))),
    'hot': ('exact', Case('overconfident', gamma=2, temperature=1.7)),
    'top_k': ('exact', Case(top_k=3, vocab=8)),
    'top_p': ('exact', Case('similar', top_p=0.8)),
    'uniform_draft': ('exact', Case('uniform')),
    'same_model': ('exact', Case('same')),
    'greedy_draft_top_p': ('exact', Case(gamma=2, temperature=0.8, top_p=0.9,
                                         draft_temperature=0.0, prompt=(3, 2))),
    'block': ('block', Case()),
    'block_top_k_and_p': ('block', Case(gamma=4, temperature=1.3, top_k=4, top_p=0.7,
                                        prompt=(4, 4))),
    'block_greedy_draft': ('block', Case('similar', draft_temperature=0.0)),
    'adaptive': ('exact', Case('similar', min_confidence=0.4)),
    'adaptive_greedy_top_p': ('exact', Case('similar', top_p=0.8, draft_temperature=0.0,
                                            min_confidence=0.4)),
    'adaptive_block': ('block', Case('similar', gamma=4, temperature=0.7, min_confidence=0.4)),
}


@pytest.fixture(scope='module')
def p_values():
  """Of every case, after Holm's correction."""
  found = [laws.p_value(case, rules.for_sampling(rule, 1.0, case.sampling))
           for rule, case in CASES.values()]
  return dict(zip(CASES, tables.holm(found)))


@pytest.mark.parametrize('name', CASES)
def test_speculative_samples_follow_the_targets_law(name, p_values):
  assert p_values[name] > 1e-3


def test_adaptive_cases_stop_early_and_reach_the_longest_draft():
  """Otherwise they would say nothing about either."""
  out = laws.sample(CASES['adaptive'][1], rules.Exact(), num_samples=2000)
  drafted, calls = out.stats.drafted_b.sum(), out.stats.target_calls_b.sum()
  assert 1.2 * calls < drafted < 2.8 * calls
  assert out.stats.reached_bg[:, 2].sum() > 0


@dataclasses.dataclass(frozen=True)
class ResidualForgotten:
  """A classic slip: the correction token drawn from the target, not from the residual."""
  lossless = True

  def __call__(self, target_log_probs_btv, proposal, key_b):
    verdict = rules.Exact()(target_log_probs_btv, proposal, key_b)
    next_bv = judging.at_position(target_log_probs_btv, verdict.num_accepted_b)
    return verdict.replace(next_token_b=sampling_lib.categorical(key_b, next_bv))


@dataclasses.dataclass(frozen=True)
class BonusUnwarped:
  """Another: the bonus token drawn at temperature 1 (EAGLE-1 and its descendants)."""
  temperature: float
  lossless = True

  def __call__(self, target_log_probs_btv, proposal, key_b):
    verdict = rules.Exact()(target_log_probs_btv, proposal, key_b)
    bonus_b = sampling_lib.categorical(key_b, target_log_probs_btv[:, -1] * self.temperature)
    is_bonus_b = verdict.num_accepted_b == proposal.tokens_bg.shape[1]
    return verdict.replace(next_token_b=jnp.where(is_bonus_b, bonus_b, verdict.next_token_b))


@dataclasses.dataclass(frozen=True)
class StopTakenForRefusal:
  """A third, of adaptive lengths: where drafting stopped, the residual of a filler position."""
  lossless = True

  def __call__(self, target_log_probs_btv, proposal, key_b):
    verdict = rules.Exact()(target_log_probs_btv, proposal, key_b)
    next_bv = judging.residual_log_probs(
        judging.at_position(target_log_probs_btv, verdict.num_accepted_b),
        judging.at_position(proposal.log_probs_bgv, verdict.num_accepted_b))
    return verdict.replace(next_token_b=sampling_lib.categorical(key_b, next_bv))


@struct.dataclass
class Peeking:
  """A fourth: a draft cut before its first unlikely token, which was then seen but not judged."""
  drafter: object
  gamma: int = struct.field(pytree_node=False, default=3)

  def prefill(self, *inputs):
    return self.drafter.prefill(*inputs)

  def propose(self, state, key_b):
    proposal = self.drafter.propose(state, key_b)
    likely_bg = judging.token_log_probs(proposal.log_probs_bgv, proposal.tokens_bg) > np.log(0.4)
    return proposal.replace(num_drafted_b=judging.leading_true(likely_bg))

  def commit(self, *inputs):
    return self.drafter.commit(*inputs)


@pytest.mark.parametrize('name, rule', [('plain', ResidualForgotten()),
                                        ('cold_gamma1', BonusUnwarped(0.6)),
                                        ('adaptive', StopTakenForRefusal())])
def test_the_law_test_catches_known_slips(name, rule):
  assert laws.p_value(CASES[name][1], rule) < 1e-12


def test_the_law_test_catches_a_draft_that_looks_at_the_token_it_drops():
  case = CASES['plain'][1]
  assert laws.p_value(case, rules.Exact(), drafter=Peeking(case.drafter)) < 1e-12


def test_holm_corrects_as_published():
  """Holm 1979: the i-th smallest of m times m - i + 1, never decreasing, at most 1."""
  np.testing.assert_allclose(tables.holm([0.04, 0.01, 0.03, 0.5]), [0.09, 0.04, 0.09, 0.5])


@pytest.mark.parametrize('sampling', [
    sampling_lib.Sampling(1.0), sampling_lib.Sampling(0.0), sampling_lib.Sampling(0.5, top_k=2),
    sampling_lib.Sampling(1.5, top_p=0.6), sampling_lib.Sampling(1.0, top_k=4, top_p=0.5)])
def test_warp_agrees_with_the_oracle(sampling):
  logits = np.random.default_rng(3).normal(size=(50, 9)).astype(np.float32) * 2
  ours = np.exp(sampling_lib.warp(jnp.asarray(logits), sampling))
  theirs = [tables.warped(row, sampling.temperature, sampling.top_k, sampling.top_p)
            for row in logits]
  np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_exact_rule_never_keeps_what_the_target_forbids():
  """At a forbidden token target probability is 0 and even a uniform draw of 0 must reject."""
  target = jnp.log(jnp.asarray([[[0.0, 1.0], [0.0, 1.0]]] * 512))
  proposal = structs.Proposal(tokens_bg=jnp.zeros((512, 1), jnp.int32),
                              log_probs_bgv=jnp.zeros((512, 1, 2)) + jnp.log(0.5),
                              drafter_state=None)
  verdict = jax.jit(rules.Exact())(target, proposal, jax.random.split(jax.random.key(0), 512))
  assert int(verdict.num_accepted_b.sum()) == 0
  assert bool((verdict.next_token_b == 1).all())


def test_empty_residual_falls_back_to_the_target():
  law = jnp.log(jnp.asarray([[0.25, 0.75]]))
  np.testing.assert_allclose(judging.residual_log_probs(law, law), law)


def test_acceptance_counts_match_the_overlap():
  """The counted acceptance at one context is sum_v min(target, draft) there."""
  case = Case(gamma=1)
  out = laws.sample(case, rules.Exact(), new_tokens=1)
  chances = [np.asarray(jax.nn.softmax(m.logits_vvv[case.prompt]))
             for m in (case.target, case.drafter.module)]
  overlap = np.minimum(*chances).sum()
  accepted = out.stats.accepted_bg.sum() / out.stats.reached_bg.sum()
  assert abs(accepted - overlap) < 4 * np.sqrt(overlap * (1 - overlap) / laws.NUM_SAMPLES)


@pytest.mark.parametrize('k', [1, 2, 5, 99])
def test_the_threshold_is_what_sorting_finds(k):
  """With ties, negative values, both zeros and forbidden tokens; all of them if k is too large."""
  rng = np.random.default_rng(k)
  values = np.round(3 * rng.normal(size=(4, 3, 11)), 1).astype(np.float32)
  values[0, 0, :9], values[1], values[2, 1, ::2] = -np.inf, -0.0, 0.0
  found = sampling_lib.greatest_threshold(jnp.asarray(values), 1.0, k)
  np.testing.assert_array_equal(found, np.sort(values, axis=-1)[..., -min(k, 11)])
