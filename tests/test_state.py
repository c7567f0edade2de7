"""Schedules, optimizers and the settings that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from specdistill_jax.training import state


def settings(**fields):
  section = common.train()
  section.update(dict(steps=100, warmup_steps=10, learning_rate=1.0, final_fraction=0.1) | fields)
  return section


def rates(**fields):
  section = settings(**fields)
  schedule = state.schedule(section)
  return np.array([schedule(step) for step in range(section.steps)])


@pytest.mark.parametrize('kind', state.SCHEDULES)
def test_warm_up_is_linear_and_the_peak_is_reached(kind):
  rate = rates(schedule=kind)
  np.testing.assert_allclose(rate[:11], np.arange(1, 12) / 11, rtol=1e-6)
  assert rate.max() == 1 and rate.argmax() == 10


def test_decays_end_at_the_final_fraction():
  for kind in ('cosine', 'linear', 'plateau_cosine'):
    np.testing.assert_allclose(rates(schedule=kind)[-1], 0.1, rtol=1e-5)
  assert np.all(rates(schedule='constant')[10:] == 1)


def test_midpoints_have_closed_forms():
  half = 10 + 89 / 2
  lower, upper = int(half), int(half) + 1
  for kind in ('cosine', 'linear'):
    rate = rates(schedule=kind)
    np.testing.assert_allclose((rate[lower] + rate[upper]) / 2, 0.55, atol=1e-4)
  assert rates(schedule='cosine')[30] > rates(schedule='linear')[30]


def test_plateau_lasts_until_half_of_the_steps():
  """DistillSpec's schedule: peak until half of the steps, then a cosine."""
  rate = rates(schedule='plateau_cosine')
  assert np.all(rate[10:51] == 1) and rate[51] < 1
  done = (np.arange(50, 100) - 50) / 49
  np.testing.assert_allclose(rate[50:], 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * done)), rtol=1e-5)


PARAMS = {'weight_df': jnp.full((4, 3), 2.0), 'scale_d': jnp.full((2, 4), 2.0),
          'up_bias_df': jnp.full((4, 3), 2.0)}


def first_update(params=PARAMS, **fields):
  fields = dict(warmup_steps=0, schedule='constant') | fields
  transformation = state.optimizer(settings(**fields))
  grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), params)
  return transformation.update(grads, transformation.init(params), params)[0]


@pytest.mark.parametrize('name', state.OPTIMIZERS)
def test_weight_decay_is_scaled_by_the_rate_and_spares_norms_and_biases(name):
  plain = first_update(optimizer=name, learning_rate=0.5)
  decayed = first_update(optimizer=name, learning_rate=0.5, weight_decay=0.1)
  np.testing.assert_allclose(decayed['weight_df'] - plain['weight_df'], -0.5 * 0.1 * 2, rtol=1e-4)
  np.testing.assert_array_equal(decayed['scale_d'], plain['scale_d'])
  np.testing.assert_array_equal(decayed['up_bias_df'], plain['up_bias_df'])


def test_adafactor_follows_the_external_rate_alone():
  """No relative step and no scaling by the parameters: Optax scales by default."""
  update = first_update(optimizer='adafactor', clip_norm=None)
  large = first_update(jax.tree.map(lambda x: 100 * x, PARAMS), optimizer='adafactor',
                       clip_norm=None)
  jax.tree.map(np.testing.assert_array_equal, update, large)
  half = first_update(optimizer='adafactor', learning_rate=0.5, clip_norm=None)
  np.testing.assert_allclose(half['weight_df'], 0.5 * update['weight_df'], rtol=1e-6)
  reference = optax.adafactor(1.0, multiply_by_parameter_scale=False)
  grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), PARAMS)
  expected, _ = reference.update(grads, reference.init(PARAMS), PARAMS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), update, expected)


def test_gradients_are_clipped_by_their_global_norm():
  """Adam divides the gradient's size out of one step, so two are taken, of unequal sizes."""
  def second_update(clip_norm):
    transformation = state.optimizer(settings(
        warmup_steps=0, schedule='constant', clip_norm=clip_norm))
    params = {'weight_df': jnp.ones((2, 2))}
    opt_state = transformation.init(params)
    for size in (1000.0, 1.0):
      grads = {'weight_df': jnp.full((2, 2), size)}
      update, opt_state = transformation.update(grads, opt_state, params)
    return update['weight_df'][0, 0]
  np.testing.assert_allclose(second_update(1.0), -1, rtol=1e-4)
  assert abs(second_update(None) + 1) > 0.2


@pytest.mark.parametrize('fields, match', [
    (dict(steps=0), 'train.steps is 0, and must be at least 1'),
    (dict(warmup_steps=101), r'warmup_steps is 101.*steps \(100\)'),
    (dict(warmup_steps=60, schedule='plateau_cosine'), 'at most half of steps'),
    (dict(batch_size=12, accumulation=2), r'batch_size is 12.*2 x 4'),
    (dict(optimizer='lamb'), "'lamb'.*adamw, adafactor"),
    (dict(schedule='step'), "'step'.*plateau_cosine"),
    (dict(learning_rate=-1.0), 'learning_rate is -1.0'),
    (dict(clip_norm=0.0), 'clip_norm is 0.0'),
    (dict(dropout=1.0), 'dropout is 1.0'),
    (dict(final_fraction=2.0), 'final_fraction is 2.0'),
    (dict(eval_every=0), 'eval_every is 0'),
])
def test_impossible_settings_are_refused(fields, match):
  state.check(settings(), row_devices=4)
  with pytest.raises(ValueError, match=match):
    state.check(settings(**fields), row_devices=4)
