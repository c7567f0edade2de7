"""LK losses in training: the overlap before, many devices, selective tokens, and a study."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
import drafts
import models
import studies
from specdistill_jax import sharding
from specdistill_jax.drafters import families
from specdistill_jax.losses import objectives
from specdistill_jax.models import base
from specdistill_jax.stages import distill
from specdistill_jax.stages import heldout
from specdistill_jax.stages import train
from specdistill_jax.training import laws
from specdistill_jax.training import state as state_lib
from specdistill_jax.training import step

POSITIONS = 2
BATCH = drafts.rows(count=8)


@functools.cache
def target():
  with jax.ensure_compile_time_eval():
    return drafts.target(num_layers=1, vocab_size=20)  # over two devices


@functools.cache
def draft(seed=3):
  """Of two positions, with a matrix over the vocabulary of its own for each."""
  with jax.ensure_compile_time_eval():
    config = families.config(dict(family='medusa', positions=POSITIONS), target().config)
    return base.Model(jax.jit(families.init, static_argnums=0)(config, jax.random.key(seed)),
                      config)


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


@functools.cache
def gradients(data, fsdp, tensor, *, chunk, accumulation):
  mesh = sharding.make_mesh(data, fsdp, tensor, jax.devices()[:data * fsdp * tensor])
  place = lambda module: jax.device_put(module, sharding.parameter_shardings(module, mesh))
  def function(student, teacher, batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return step.gradients(objectives.Objective('lk_hybrid'), student, teacher, batch, None,
                            accumulation=accumulation, first=0, mesh=mesh, chunk=chunk)
  return jax.jit(function)(place(draft().module), place(target().module), jax.device_put(
      jax.tree.map(jnp.asarray, BATCH), sharding.batch_sharding(mesh)))


@pytest.mark.parametrize('sizes, chunk, accumulation', [
    ((1, 1, 1), None, 4), ((2, 2, 2), 4, 2)])
def test_positions_are_mixed_by_the_overlap_of_the_global_batch(sizes, chunk, accumulation):
  """Not of the chunk, the shard, or the micro-batch; with a sharded vocabulary too."""
  expected = gradients(1, 1, 1, chunk=None, accumulation=1)
  found = gradients(*sizes, chunk=chunk, accumulation=accumulation)
  assert len(set(np.asarray(expected[1].alpha_g))) == POSITIONS
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_the_overlap_before_mixes_the_next_update():
  """It starts at 0, where the KL is all, and one forward pass serves micro-batches."""
  objective = objectives.Objective('lk_hybrid', alpha_over='previous')
  section = common.train()
  section.update(steps=4, batch_size=8, warmup_steps=0, learning_rate=1e-2)
  mesh = one_device()

  def run(accumulation):
    section.accumulation = accumulation
    create = functools.partial(
        state_lib.create, transformation=state_lib.optimizer(section, objective))
    abstract = jax.eval_shape(lambda: create(draft().module))
    update = step.make(section, objective, None, mesh, abstract)
    state = jax.jit(create)(jax.tree.map(jnp.copy, draft().module))
    metrics = []
    for _ in range(3):
      state, found = update(state, target().module, BATCH, jax.random.key(0))
      metrics.append(jax.device_get(found))
    return metrics

  found, parts = run(1), run(2)
  np.testing.assert_array_equal(found[0].kl_weight_g, np.ones(POSITIONS))
  for before, after in zip(found, found[1:]):
    np.testing.assert_allclose(after.kl_weight_g, np.exp(-3 * before.alpha_g), rtol=1e-6)
  for whole, part in zip(found, parts):
    np.testing.assert_allclose(whole.loss, part.loss, rtol=1e-5)
    np.testing.assert_allclose(whole.grad_norm, part.grad_norm, rtol=1e-4)


@pytest.mark.parametrize('kind', ['standalone', 'medusa'])
def test_selective_objectives_learn_from_the_share_that_they_keep(kind):
  student, other = ((draft(seed).module if kind == 'medusa' else
                     models.tiny(seed, num_layers=1, vocab_size=20).module) for seed in (3, 4))
  objective = lambda keep: objectives.Objective('forward_kl', keep=keep, normalisation='token')
  losses = jax.jit(step.losses, static_argnums=0)
  whole = losses(objective(1.0), student, target().module, BATCH)
  guided = laws.Guided(target().module, other)
  kept = losses(objective(0.4), student, guided, BATCH)
  assert 0 < kept.num_tokens < 0.7 * whole.num_tokens  # at least one of each short row
  # Against itself as reference every token is alike, and the first ones are kept.
  assert np.isfinite(losses(objective(0.4), student,
                            laws.Guided(target().module, student), BATCH).loss)


@pytest.fixture
def one_device_studies(monkeypatch):
  monkeypatch.setattr(sharding, 'make_mesh', functools.partial(
      sharding.make_mesh, devices=jax.devices()[:1]))
  monkeypatch.setattr(heldout, 'GAMMA', 2)


def test_a_study_trains_an_arm_for_each_objective(tmp_path, one_device_studies):
  """On the draft's own samples; arms are named by their objectives, figures by position."""
  del one_device_studies
  studies.write_data(tmp_path)
  config = studies.config(steps=2, eval_every=2)
  for which in ('target', 'draft'):
    train.run(config, tmp_path, which)
  config.distill.update(control=False, also=('lk_hybrid,eta=10,alpha_over=previous',
                                             'forward_kl,keep=0.5'))
  distill.run(config, tmp_path)
  assert distill.arm_names(config) == [
      'forward_kl-draft-seed0', 'lk_hybrid,eta=10,alpha_over=previous-draft-seed0',
      'forward_kl,keep=0.5-draft-seed0']
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  last = {row['run']: row for row in rows if row['stage'] == 'distill'}
  assert list(last) == distill.arm_names(config)
  hybrid = last['lk_hybrid,eta=10,alpha_over=previous-draft-seed0']
  np.testing.assert_allclose(hybrid['kl_weight_by_position'],
                             np.exp(-10 * np.array(hybrid['alpha_by_position'])), rtol=1e-5)
  assert hybrid['trained_kl_weight_by_position'][0] < 1  # not of the first update
  for row in last.values():
    assert row['validation_alpha'] == row['alpha_by_position'][0]
    np.testing.assert_allclose(row['tvd_by_position'][0], 1 - row['validation_alpha'], rtol=1e-5)
    assert 1 < row['simulated_block_efficiency'] < 3 and row['kl_by_position'][0] > 0
    assert len(row['student_entropy_by_position']) == len(row['agreement_by_position']) == 1
