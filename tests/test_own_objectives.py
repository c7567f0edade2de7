"""An objective that is a function of the user's: found by its name, checked, kept in the study."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import my_losses
import studies
from specdistill_jax.losses import objectives
from specdistill_jax.losses import specs
from specdistill_jax.stages import checks
from specdistill_jax.stages import workdirs

MASK = jnp.array([[0, 1, 1, 1, 0], [0, 0, 0, 1, 0]], jnp.float32)


def logits(seed):
  return 2 * jax.random.normal(jax.random.key(seed), (2, 5, 7))


def loss_and_gradient(spec, **fields):
  objective = objectives.from_spec(spec, **fields)
  loss = lambda student: objectives.distillation(objective, student, logits(1), MASK).loss
  return jax.value_and_grad(loss)(logits(0))


@pytest.mark.parametrize('settings', ['', ',block=2,decay=0.5'])
def test_ones_own_forward_kl_is_the_projects(settings):
  """Mask, pooling, temperature and positions treat it as they treat ours."""
  mine = loss_and_gradient(f'my_losses.forward_kl{settings}', temperature=0.7)
  ours = loss_and_gradient(f'forward_kl{settings}', temperature=0.7)
  for found, expected in zip(mine, ours):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
  assert abs(loss_and_gradient('my_losses.sharp_kl')[0] - ours[0]) > 0.1


@pytest.mark.parametrize('objective, wish', [
    ('my_losses.sharp', "has no attribute 'sharp'"),
    ('no_losses.sharp_kl', "No module named 'no_losses'"),
    ('my_losses.number', 'must be a function'),
    ('my_losses.averaged', r'is .*must be a function of logits, .*: objective .* makes float32 of '
     r'shape \[\] of logits .*neither masked nor averaged'),
    ('my_losses.nothing', 'makes a NoneType of logits'),
    ('my_losses.broken', 'fails on logits of shape .*: TypeError: '),
    ('my_losses.sharp_kl,eta=3', 'eta is of lk_hybrid only'),
])
def test_a_wrong_one_is_refused_before_anything_runs(objective, wish):
  config = studies.config()
  config.distill.objective = objective
  with pytest.raises(ValueError, match=wish):
    checks.check(config)


def test_another_function_of_the_same_name_is_another_objective(monkeypatch):
  """Compiled steps are kept by objective: a notebook's edited cell must not get the old one."""
  before = objectives.from_spec('my_losses.sharp_kl')
  monkeypatch.setattr(my_losses, 'sharp_kl', my_losses.forward_kl)
  assert objectives.from_spec('my_losses.sharp_kl') != before


def test_a_workdir_keeps_its_functions_and_goes_on_only_with_them(tmp_path, monkeypatch):
  config = studies.config()
  config.distill.objective, config.distill.also = 'my_losses.sharp_kl,block=2', ('forward_kl',)
  workdirs.claim(config, tmp_path)
  kept = json.loads((tmp_path / 'config.json').read_text())['distill']['functions']
  assert list(kept) == ['my_losses.sharp_kl']
  assert '\n'.join(kept['my_losses.sharp_kl'].values()) + '\n' == specs.source('my_losses.sharp_kl')
  workdirs.check(config, tmp_path)
  monkeypatch.setattr(my_losses, 'sharp_kl', my_losses.forward_kl)
  with pytest.raises(ValueError, match="'def sharp_kl.* there and 'def forward_kl"):
    workdirs.check(config, tmp_path)
