"""alpha: closed forms, its counting of tokens, and its agreement with the real sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from specdistill_jax import api
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.evaluation import acceptance

SAMPLING = sampling_lib.Sampling(1.0)
GREEDY = sampling_lib.Sampling(0.0)


def log_probs(*laws):
  return jnp.log(jnp.asarray(laws, jnp.float32))[None]


def test_overlap_of_equal_disjoint_and_mixed_laws():
  one = log_probs([0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.3, 0.2])
  two = log_probs([0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.2, 0.2, 0.6])
  np.testing.assert_allclose(acceptance.overlap(one, two), [[1.0, 0.0, 0.6]], atol=1e-6)
  np.testing.assert_allclose(acceptance.overlap(two, one), acceptance.overlap(one, two))
  with pytest.raises(ValueError, match=r'\(1, 3, 3\).*\(1, 2, 3\)'):
    acceptance.overlap(one, one[:, :2])


def test_overlap_is_one_less_total_variation():
  key_one, key_two = jax.random.split(jax.random.key(0))
  one = jax.nn.log_softmax(2 * jax.random.normal(key_one, (2, 3, 11)))
  two = jax.nn.log_softmax(2 * jax.random.normal(key_two, (2, 3, 11)))
  variation = 0.5 * jnp.abs(jnp.exp(one) - jnp.exp(two)).sum(-1)
  np.testing.assert_allclose(acceptance.overlap(one, two), 1 - variation, atol=1e-6)


@pytest.fixture(scope='module')
def pair():
  target = models.tiny(0, scale=2.0)
  return target, models.perturbed(target, 0.15)


@pytest.fixture(scope='module')
def rows_of_tokens():
  """Ragged prompts and continuations, right-padded with noise."""
  tokens_bt = np.random.default_rng(0).integers(2, models.VOCAB, size=(4, 12)).astype(np.int32)
  return tokens_bt, np.array([3, 7, 5, 1], np.int32), np.array([9, 8, 12, 6], np.int32)


def counts(target, drafter, inputs, sampling=SAMPLING):
  return np.asarray(acceptance.alpha_counts(
      target.module, drafter.module, *inputs, sampling=sampling))


@pytest.mark.parametrize('sampling', [SAMPLING, GREEDY], ids=['sampled', 'greedy'])
def test_a_model_agrees_with_itself_everywhere(pair, rows_of_tokens, sampling):
  target, _ = pair
  found = counts(target, target, rows_of_tokens, sampling)
  _, starts, ends = rows_of_tokens
  np.testing.assert_allclose(found[:, 1], ends - starts)
  np.testing.assert_allclose(found[:, 0], ends - starts, rtol=1e-5)


@pytest.mark.parametrize('sampling', [SAMPLING, GREEDY], ids=['sampled', 'greedy'])
def test_counts_equal_a_loop_over_tokens(pair, rows_of_tokens, sampling):
  """Token by token, each from its own prefix: pins the shift between logits and tokens."""
  target, drafter = pair
  tokens_bt, starts, ends = rows_of_tokens
  found = counts(target, drafter, rows_of_tokens, sampling)
  law = jax.jit(lambda module, tokens: jnp.exp(sampling_lib.warp(
      module.causal(tokens).logits_btv, sampling)))
  for row in range(len(tokens_bt)):
    total = 0.0
    for position in range(starts[row], ends[row]):
      prefix = np.zeros((1, tokens_bt.shape[1]), np.int32)
      prefix[0, :position] = tokens_bt[row, :position]
      laws = [np.asarray(law(model.module, prefix))[0, position - 1] for model in pair]
      total += np.minimum(*laws).sum()
    assert found[row, 0] == pytest.approx(total, abs=1e-4)
  assert 0 < found[:, 0].sum() < found[:, 1].sum()


def test_what_follows_a_row_does_not_count(pair, rows_of_tokens):
  target, drafter = pair
  tokens_bt, starts, ends = rows_of_tokens
  changed = tokens_bt.copy()
  for row, end in enumerate(ends):
    changed[row, end:] = 3
  np.testing.assert_allclose(counts(target, drafter, (changed, starts, ends)),
                             counts(target, drafter, rows_of_tokens), rtol=1e-5)


def test_first_position_acceptance_is_alpha_there(pair):
  """The sampler keeps a first draft with probability sum_v min(target, draft): the metric and
  the real decoder must speak of the same thing."""
  target, drafter = pair
  prompt = [5, 9, 3, 7]
  tokens_bt = np.array([prompt + [2]], np.int32)
  overlap = counts(target, drafter, (tokens_bt, np.array([4]), np.array([5])))[0, 0]
  trials = 2000
  stats = api.speculate(target, drafter, [prompt] * trials, gamma=2, max_new_tokens=2,
                        key=jax.random.key(3)).stats
  # With two new tokens a row needs a second call exactly if its first draft was rejected and
  # corrected by something else than the end token.
  kept = (np.asarray(stats.target_calls_b) == 1) & (np.asarray(stats.accepted_bg)[:, 0] > 0)
  assert overlap == pytest.approx(kept.mean(), abs=4 * np.sqrt(0.25 / trials))
  assert 0.05 < overlap < 0.95


def test_by_position_has_none_where_nothing_was_reached():
  assert acceptance.by_position(np.array([3, 0, 0]), np.array([4, 2, 0])) == [0.75, 0.0, None]
