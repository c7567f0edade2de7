"""The emitted tokens follow the target's law: enumerated exactly, then chi-square.

200,000 jitted samples a case; a wrong rule is shown to fail the same test.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdistill_jax import structs
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.drafters import lm
import tables

NUM_SAMPLES = 200_000
DEPTH = 3
NEW_TOKENS = 4  # beyond the depth, so that cycles straddle it
TARGET = tables.random_table(0, 5)
DRAFTS = {
    'unrelated': tables.random_table(1, 5),
    'similar': tables.TableModel(TARGET.logits_vvv + 0.4 * tables.random_table(2, 5).logits_vvv),
    'overconfident': tables.TableModel(4.0 * TARGET.logits_vvv),
    'uniform': tables.TableModel(jnp.zeros((5, 5, 5))),
    'same': TARGET,
}
# name: (draft, gamma, temperature, top_k, top_p, greedy drafts, prompt)
CASES = {
    'plain': ('unrelated', 3, 1.0, None, None, False, (2, 3)),
    'gamma1': ('unrelated', 1, 1.0, None, None, False, (2, 3)),
    'beyond_budget': ('similar', 7, 1.0, None, None, False, (4, 2)),
    'one_token_prompt': ('similar', 2, 1.0, None, None, False, (3,)),
    'cold': ('overconfident', 3, 0.6, None, None, False, (2, 2, 4)),
    'cold_gamma1': ('similar', 1, 0.6, None, None, False, (2, 2, 4)),
    'hot': ('overconfident', 2, 1.7, None, None, False, (2, 3)),
    'top_k': ('unrelated', 3, 1.0, 3, None, False, (2, 3)),
    'top_p': ('similar', 3, 1.0, None, 0.8, False, (2, 3)),
    'top_k_and_p': ('unrelated', 4, 1.3, 4, 0.7, False, (4, 4)),
    'uniform_draft': ('uniform', 3, 1.0, None, None, False, (2, 3)),
    'same_model': ('same', 3, 1.0, None, None, False, (2, 3)),
    'greedy_draft': ('similar', 3, 1.0, None, None, True, (2, 3)),
    'greedy_draft_top_p': ('unrelated', 2, 0.8, None, 0.9, True, (3, 2)),
}


def _sample(draft, gamma, sampling, draft_sampling, prompt, rule, new_tokens=NEW_TOKENS):
  prompts_bt = jnp.broadcast_to(jnp.asarray(prompt), (NUM_SAMPLES, len(prompt)))
  lengths_b = jnp.full((NUM_SAMPLES,), len(prompt))
  drafter = lm.LMDrafter(module=draft, gamma=gamma, sampling=draft_sampling)
  state = engine.prefill_speculative(TARGET, drafter, prompts_bt, lengths_b, jax.random.key(7),
                                     max_new_tokens=new_tokens)
  state = engine.decode_speculative(TARGET, drafter, state, rule=rule, sampling=sampling)
  return engine.generation(state, max_new_tokens=new_tokens)


def _p_value(case, rule):
  draft, gamma, temperature, top_k, top_p, greedy, prompt = CASES[case]
  sampling = sampling_lib.Sampling(temperature, top_k, top_p)
  draft_sampling = sampling_lib.Sampling(0.0) if greedy else sampling
  out = _sample(DRAFTS[draft], gamma, sampling, draft_sampling, prompt, rule)
  law = tables.enumerated_law(
      TARGET, prompt, DEPTH, temperature=temperature, top_k=top_k, top_p=top_p)
  return tables.chi_square_p_value(law, np.asarray(out.tokens), np.asarray(out.lengths), DEPTH)


@pytest.mark.parametrize('case', CASES)
def test_speculative_samples_follow_the_targets_law(case):
  assert _p_value(case, rules.Exact()) > 1e-3 / len(CASES)


@pytest.mark.parametrize('case', ['plain', 'top_k_and_p', 'greedy_draft'])
def test_block_verification_follows_the_targets_law(case):
  assert _p_value(case, rules.Block()) > 1e-3 / 3


def test_block_verification_keeps_eleven_ninths():
  """The toy of Sun et al. 2024: two drafted tokens, laws (1/3, 2/3) and (2/3, 1/3) throughout.

  Token verification keeps 10/9 tokens in expectation, block verification 11/9.
  """
  count = 200_000
  target, draft = jnp.log(jnp.asarray([1 / 3, 2 / 3])), jnp.log(jnp.asarray([2 / 3, 1 / 3]))
  keys = jax.random.split(jax.random.key(0), (2, count))
  tokens_bg = jax.vmap(lambda key: jax.random.categorical(key, draft, shape=(2,)))(keys[0])
  proposal = structs.Proposal(tokens_bg, jnp.broadcast_to(draft, (count, 2, 2)), None)
  target_btv = jnp.broadcast_to(target, (count, 3, 2))
  for rule, expected in ((rules.Exact(), 10 / 9), (rules.Block(), 11 / 9)):
    kept = float(jax.jit(rule)(target_btv, proposal, keys[1]).num_accepted_b.mean())
    assert abs(kept - expected) < 4 * 0.9 / np.sqrt(count)


@dataclasses.dataclass(frozen=True)
class ResidualForgotten:
  """A classic slip: the correction token drawn from the target, not from the residual."""
  lossless = True

  def __call__(self, target_log_probs_btv, proposal, key_b):
    verdict = rules.Exact()(target_log_probs_btv, proposal, key_b)
    next_bv = jnp.take_along_axis(
        target_log_probs_btv, verdict.num_accepted_b[:, None, None], axis=1)[:, 0]
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


@pytest.mark.parametrize('case, rule', [('plain', ResidualForgotten()),
                                        ('cold_gamma1', BonusUnwarped(0.6))])
def test_the_law_test_catches_known_slips(case, rule):
  assert _p_value(case, rule) < 1e-12


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
  verdict = rules.Exact()(target, proposal, jax.random.split(jax.random.key(0), 512))
  assert int(verdict.num_accepted_b.sum()) == 0
  assert bool((verdict.next_token_b == 1).all())


def test_empty_residual_falls_back_to_the_target():
  law = jnp.log(jnp.asarray([[0.25, 0.75]]))
  np.testing.assert_allclose(rules.residual_log_probs(law, law), law)


def test_acceptance_counts_match_the_overlap():
  """The counted acceptance at one context is sum_v min(target, draft) there."""
  prompt, sampling = (2, 3), sampling_lib.Sampling(1.0)
  out = _sample(DRAFTS['unrelated'], 1, sampling, sampling, prompt, rules.Exact(), new_tokens=1)
  laws = [np.asarray(jax.nn.softmax(m.logits_vvv[prompt])) for m in (TARGET, DRAFTS['unrelated'])]
  overlap = np.minimum(*laws).sum()
  accepted = out.stats.accepted_bg.sum() / out.stats.reached_bg.sum()
  assert abs(accepted - overlap) < 4 * np.sqrt(overlap * (1 - overlap) / NUM_SAMPLES)
