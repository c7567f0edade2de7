"""The update: frozen teacher, exact accumulation, the same losses on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
import models
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.decoding import sampling
from specdistill_jax.losses import objectives
from specdistill_jax.models import decoder
from specdistill_jax.training import rollouts
from specdistill_jax.training import state as state_lib
from specdistill_jax.training import step

WIDTH = 8
CONFIG = models.config(num_layers=1)
FORWARD_KL = objectives.Objective('forward_kl')
SUPERVISED = objectives.Objective()
ROLLOUT = rollouts.Rollout(sampling.Sampling(), max_new_tokens=5, prompt_width=3,
                           shortest_prompt=2)


def settings(**fields):
  section = common.train()
  section.update(dict(steps=10, batch_size=8, warmup_steps=0, learning_rate=1e-2) | fields)
  return section


def batch(rows=8):
  """Ragged rows: the micro-batches of an accumulation hold unequal numbers of tokens."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(4, WIDTH + 1, rows).astype(np.int32)
  prompts = rng.integers(2, 4, rows).astype(np.int32)
  position = np.arange(WIDTH)[None]
  tokens = rng.integers(2, models.VOCAB, (rows, WIDTH))
  return structs.Batch(
      tokens_bt=np.where(position < lengths[:, None], tokens, structs.PAD_ID).astype(np.int32),
      loss_mask_bt=((position >= prompts[:, None])
                    & (position < lengths[:, None])).astype(np.float32),
      prompt_lengths_b=prompts, lengths_b=lengths)


@functools.cache
def student():
  with jax.ensure_compile_time_eval():  # whichever test asks first may do so inside a trace
    return models.tiny(0, num_layers=1).module


@functools.cache
def teacher():
  with jax.ensure_compile_time_eval():
    return models.tiny(1, num_layers=1, scale=2.0).module


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def start(mesh, section, config=CONFIG, layout='sharded'):
  create = functools.partial(state_lib.create, transformation=state_lib.optimizer(section))
  abstract = jax.eval_shape(lambda: create(decoder.init(config, jax.random.key(0))))
  params = jax.tree.unflatten(jax.tree.structure(abstract.params), jax.tree.leaves(student()))
  shardings = sharding.parameter_shardings(abstract, mesh, layout)
  return jax.jit(create, out_shardings=shardings)(jax.device_get(params)), abstract


def train(mesh, section, num_steps=3, teacher_layout='sharded', student_layout='sharded'):
  """On-policy distillation for a few steps; the metrics of each."""
  state, abstract = start(mesh, section, layout=student_layout)
  update = step.make(section, FORWARD_KL, ROLLOUT, mesh, abstract, student_layout)
  placed = jax.device_put(
      teacher(), sharding.parameter_shardings(teacher(), mesh, teacher_layout))
  rows = jax.device_put(batch(), sharding.batch_sharding(mesh))
  metrics, leaf = [], jax.tree.leaves(state.params)[0]
  for _ in range(num_steps):
    state, figures = update(state, placed, rows, jax.random.key(0))
    metrics.append(jax.device_get(figures))
  assert leaf.is_deleted(), 'the state was not donated'
  assert update._cache_size() == 1, 'the layout of the state changed between steps'
  return metrics


@functools.cache
def gradient_of_the_loss():
  loss = lambda model: step.losses(FORWARD_KL, model, teacher(), batch()).loss
  return jax.jit(jax.value_and_grad(loss))(student())


@pytest.mark.parametrize('accumulation', [1, 4])
def test_accumulated_gradient_is_that_of_the_large_batch(accumulation):
  grads, totals = jax.jit(functools.partial(
      step.gradients, FORWARD_KL, first=0, mesh=one_device(), dropout_key=None,
      accumulation=accumulation))(student(), teacher(), batch())
  loss, expected = gradient_of_the_loss()
  np.testing.assert_allclose(totals.loss, loss, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected)


def test_no_gradient_reaches_the_teacher():
  grads = jax.jit(jax.grad(
      lambda t: step.losses(FORWARD_KL, student(), t, batch()).loss_sum))(teacher())
  jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)


def test_no_gradient_flows_through_sampling():
  """The gradient with rollouts inside is the one on the same rows held fixed."""
  def loss(model, rows):
    return step.losses(FORWARD_KL, model, teacher(), rows, first=1).loss_sum
  def sampled(model):
    return rollouts.generate(model, batch(), jax.random.key(0), ROLLOUT)
  inside = jax.jit(jax.grad(lambda model: loss(model, sampled(model))))(student())
  outside = jax.jit(jax.grad(loss))(student(), jax.jit(sampled)(student()))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), inside, outside)


def test_skipping_prompt_positions_changes_no_loss():
  assert ROLLOUT.first_supervised == 1
  rows = batch()
  losses = jax.jit(functools.partial(step.losses, FORWARD_KL), static_argnames='first')
  whole = losses(student(), teacher(), rows)
  short = losses(student(), teacher(), rows, first=ROLLOUT.first_supervised)
  for found, expected in zip(jax.tree.leaves(short), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@functools.cache
def metrics_on_one_device():
  return train(one_device(), settings())


@pytest.mark.parametrize('sizes, accumulation, layouts', [
    (dict(), 1, {}), (dict(data=2, fsdp=2, tensor=2), 2, {}),
    (dict(data=1, fsdp=4, tensor=2), 1,
     dict(teacher_layout='sharded', student_layout='replicated'))])
def test_eight_devices_give_the_losses_of_one(sizes, accumulation, layouts):
  """On-policy, so that rollouts too are the same whatever holds the rows, or the weights."""
  actual = train(sharding.make_mesh(**sizes), settings(accumulation=accumulation), **layouts)
  for ours, reference in zip(actual, metrics_on_one_device(), strict=True):
    np.testing.assert_allclose(ours.loss, reference.loss, rtol=1e-5)
    np.testing.assert_allclose(ours.alpha, reference.alpha, rtol=1e-5)
    np.testing.assert_allclose(ours.grad_norm, reference.grad_norm, rtol=1e-4)
    assert ours.num_tokens == reference.num_tokens and ours.on_policy == 1


def test_small_updates_add_up_in_the_masters():
  """In bfloat16 alone an update of a 2000th of a weight would be lost, time after time."""
  section, mesh = settings(weights_dtype='bfloat16', learning_rate=1e-5, schedule='constant',
                           clip_norm=None), one_device()
  state, abstract = start(mesh, section)
  before = np.asarray(state.params.embedding_vd[...])
  update = step.make(section, SUPERVISED, None, mesh, abstract)
  for _ in range(3):
    state, _ = update(state, None, batch(), jax.random.key(0))
  after = np.asarray(state.params.embedding_vd[...])
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype('float32')}
  learnt = np.abs(after - before) > 0
  assert learnt.mean() > 0.5
  assert np.max(np.abs(after - before)) < 1e-4 < np.max(np.abs(before)) / 256


def test_passes_read_the_copy_in_bfloat16():
  """The first step's loss is that of the rounded weights, not of the masters."""
  mesh = one_device()
  def first_loss(params, **fields):
    section = settings(**fields)
    state, abstract = start(mesh, section)
    state = state.replace(params=jax.tree.map(jnp.copy, params))
    update = step.make(section, SUPERVISED, None, mesh, abstract)
    return float(update(state, None, batch(), jax.random.key(0))[1].loss)
  rounded = jax.tree.map(lambda x: x.astype(jnp.float32),
                         sharding.matrices_in(student(), 'bfloat16'))
  assert first_loss(rounded) == pytest.approx(first_loss(student(), weights_dtype='bfloat16'),
                                              rel=1e-6)
  assert abs(first_loss(rounded) - first_loss(student())) > 1e-6


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_rematerialisation_changes_what_is_kept_and_no_gradient(remat):
  def gradient(config):
    model = jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))),
        jax.tree.leaves(student()))
    function = lambda m: step.losses(SUPERVISED, m, None, batch()).loss_sum
    return jax.jit(jax.grad(function))(model), str(jax.make_jaxpr(jax.grad(function))(model))
  plain, plain_trace = gradient(CONFIG)
  again, trace = gradient(models.config(num_layers=1, remat=remat))
  assert 'remat' in trace and 'remat' not in plain_trace
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
               jax.tree.leaves(plain), jax.tree.leaves(again))


def test_dropout_changes_with_the_step_and_is_drawn_again_on_resuming():
  section, config = settings(dropout=0.5, learning_rate=1e-9), models.config(
      num_layers=1, dropout=0.5)
  mesh = one_device()
  state, abstract = start(mesh, section, config)
  state = jax.device_get(state)
  update = step.make(section, SUPERVISED, None, mesh, abstract)
  def loss(step_number, seed=0):
    fresh = jax.device_put(state.replace(step=np.int32(step_number)))
    return float(update(fresh, None, batch(), jax.random.key(seed))[1].loss)
  assert loss(3) == loss(3)  # and without a teacher, which cross-entropy doesn't read
  assert loss(3) != loss(4)
  assert loss(3) != loss(3, seed=1)


def test_runs_that_differ_in_their_seed_share_a_compilation():
  section, mesh = settings(), one_device()
  _, abstract = start(mesh, section)
  _, again = start(mesh, settings())
  first = step.make(section, FORWARD_KL, ROLLOUT, mesh, abstract)
  assert step.make(settings(), FORWARD_KL, ROLLOUT, one_device(), again) is first
  assert step.make(settings(b1=0.8), FORWARD_KL, ROLLOUT, mesh, abstract) is not first


@pytest.mark.parametrize('name', ['loss', 'grad_norm'])
def test_non_finite_figures_stop_with_their_step(name):
  fine = step.Metrics(loss=1., alpha=float('nan'), grad_norm=1., learning_rate=1., num_tokens=1.,
                      on_policy=0)
  step.check_finite(fine, 7)
  with pytest.raises(FloatingPointError, match=f'{name} is nan at step 7'):
    step.check_finite(fine.replace(**{name: float('nan')}), 7)
