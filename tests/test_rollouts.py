"""Rollouts: what is sampled, what is learnt of it, and mixtures with stored rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from specdistill_jax import api
from specdistill_jax import structs
from specdistill_jax.decoding import sampling
from specdistill_jax.training import rollouts

LENGTHS = np.array([1, 4, 2, 3], np.int32)
PROMPTS = np.where(np.arange(6) < LENGTHS[:, None],
                   np.random.default_rng(0).integers(2, models.VOCAB, (4, 6)),
                   structs.PAD_ID).astype(np.int32)
# Stored rows: prompts, then two more tokens each.
BATCH = structs.Batch(
    tokens_bt=np.where((np.arange(6) >= LENGTHS[:, None])
                       & (np.arange(6) < LENGTHS[:, None] + 2), 5, PROMPTS),
    loss_mask_bt=((np.arange(6) >= LENGTHS[:, None])
                  & (np.arange(6) < LENGTHS[:, None] + 2)).astype(np.float32),
    prompt_lengths_b=LENGTHS, lengths_b=LENGTHS + 2)
GREEDY = rollouts.Rollout(sampling.Sampling(0.0), max_new_tokens=9, prompt_width=4)
SAMPLED = rollouts.Rollout(sampling.Sampling(1.0), max_new_tokens=9, prompt_width=4)

generate = jax.jit(rollouts.generate, static_argnames='rollout')


@functools.cache
def student(seed=0):
  return models.tiny(seed, num_layers=1, scale=2.0)


@functools.cache
def sampled(key=0):
  return jax.device_get(generate(student().module, BATCH, jax.random.key(key), rollout=SAMPLED))


def test_greedy_rollouts_are_the_students_own_decoding():
  rollout = generate(student().module, BATCH, jax.random.key(0), rollout=GREEDY)
  prompts = [row[:n].tolist() for row, n in zip(PROMPTS, LENGTHS)]
  expected = api.generate(student(), prompts, max_new_tokens=9, temperature=0.0,
                          key=jax.random.key(0))
  for i, n in enumerate(LENGTHS):
    assert rollout.lengths_b[i] == n + expected.lengths[i]
    np.testing.assert_array_equal(rollout.tokens_bt[i, n:n + 9],
                                  expected.tokens[i, :13 - n][:9])


def test_top_k_of_one_is_greedy_at_any_temperature():
  top = rollouts.Rollout(sampling.Sampling(1.0, top_k=1), max_new_tokens=9, prompt_width=4)
  jax.tree.map(np.testing.assert_array_equal,
               generate(student().module, BATCH, jax.random.key(0), rollout=GREEDY),
               generate(student().module, BATCH, jax.random.key(1), rollout=top))


def test_prompts_are_kept_and_exactly_the_sampled_tokens_are_learnt():
  batches = [sampled(key) for key in range(8)]
  ended = 0
  for batch in batches:
    assert batch.tokens_bt.shape == (4, SAMPLED.width)
    for i, n in enumerate(LENGTHS):
      end = batch.lengths_b[i]
      np.testing.assert_array_equal(batch.tokens_bt[i, :n], PROMPTS[i, :n])
      np.testing.assert_array_equal(batch.tokens_bt[i, end:], structs.PAD_ID)
      np.testing.assert_array_equal(np.flatnonzero(batch.loss_mask_bt[i]), np.arange(n, end))
      has_end = structs.EOS_ID in batch.tokens_bt[i, n:end]
      assert has_end or end == n + 9
      if has_end:  # only as the last token, and that one is learnt
        ended += 1
        assert np.flatnonzero(batch.tokens_bt[i, n:end] == structs.EOS_ID) == [end - n - 1]
        assert batch.loss_mask_bt[i, end - 1] == 1
  assert ended, 'no row ended: the test saw nothing of end tokens'


def test_rollouts_differ_by_key_and_by_the_current_student():
  assert np.any(sampled(0).tokens_bt != sampled(1).tokens_bt)
  moved = generate(student(5).module, BATCH, jax.random.key(0), rollout=SAMPLED)
  assert np.any(sampled(0).tokens_bt != moved.tokens_bt)


def test_row_does_not_depend_on_the_rows_after_it():
  two = jax.tree.map(lambda x: x[:2], BATCH)
  alone = generate(student().module, two, jax.random.key(0), rollout=SAMPLED)
  np.testing.assert_array_equal(alone.tokens_bt, sampled(0).tokens_bt[:2])


@pytest.mark.parametrize('fraction', [0.0, 0.3])
def test_mixture_trains_on_the_students_rows_in_the_given_share_of_steps(fraction):
  mixed = rollouts.Rollout(sampling.Sampling(1.0), max_new_tokens=1, prompt_width=4,
                           student_fraction=fraction)
  mix = jax.jit(functools.partial(rollouts.mix, rollout=mixed))
  used = []
  for step in range(100):
    batch, is_student = mix(student().module, BATCH, jax.random.key(step))
    used.append(bool(is_student))
    assert batch.tokens_bt.shape == (4, 6)
    if is_student:
      assert np.all(batch.loss_mask_bt.sum(axis=1) == 1)
    else:
      jax.tree.map(np.testing.assert_array_equal, batch, BATCH)
  assert abs(np.mean(used) - fraction) <= 3 * np.sqrt(fraction * (1 - fraction) / 100)


def test_stored_rows_are_padded_to_the_width_of_rollouts():
  mixed = rollouts.Rollout(sampling.Sampling(1.0), max_new_tokens=9, prompt_width=4,
                           student_fraction=0.0)
  batch, _ = rollouts.mix(student().module, BATCH, jax.random.key(0), mixed)
  assert batch.tokens_bt.shape == batch.loss_mask_bt.shape == (4, 13)
  np.testing.assert_array_equal(batch.tokens_bt[:, :6], BATCH.tokens_bt)
  assert not jnp.any(batch.loss_mask_bt[:, 6:])


@pytest.mark.parametrize('wrong, match', [
    (dict(max_new_tokens=0), 'max_new_tokens is 0'),
    (dict(shortest_prompt=0), 'at least 1 token'),
    (dict(student_fraction=1.5), 'student_fraction is 1.5'),
])
def test_impossible_rollouts_are_refused(wrong, match):
  fields = dict(sampling=sampling.Sampling(), max_new_tokens=4, prompt_width=4)
  with pytest.raises(ValueError, match=match):
    rollouts.Rollout(**fields | wrong)
