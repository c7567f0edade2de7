"""Losses of feature-level drafts: normalisations as released, layouts, and who gets a gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drafts
from configs import common
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.checkpoints import key_tables
from specdistill_jax.drafters import feature_config
from specdistill_jax.drafters import fspad
from specdistill_jax.losses import features
from specdistill_jax.losses import objectives
from specdistill_jax.training import state as state_lib
from specdistill_jax.training import step

TARGET = drafts.target()
BATCH = drafts.rows(count=4)
FEATURE = objectives.Objective('feature')
KINDS = pytest.mark.parametrize('kind', ['fspad', 'eagle3'])
LOSSES = jax.jit(step.losses, static_argnums=0)  # one compilation a kind


@functools.cache
def draft(kind):
  return drafts.tiny(kind, TARGET)


@functools.cache
def teacher():
  output = jax.jit(lambda module: module.capturing((2, 3, 3)).causal(BATCH.tokens_bt))(
      TARGET.module)
  return jax.tree.map(lambda x: np.asarray(x, np.float64), output)


def log_softmax(x):
  x = x - x.max()
  return x - np.log(np.exp(x).sum())


def smooth_l1(z):
  """PyTorch's, beta 1, the mean over the vector."""
  return np.mean([0.5 * x * x if abs(x) < 1 else abs(x) - 0.5 for x in z])


def reference_eagle(kind):
  """Loops over rows and positions; features from the target, equations in float64."""
  p, config = drafts.numbers(draft(kind).module), draft(kind).config
  table, head = (np.asarray(x[...], np.float64)
                 for x in (TARGET.module.embedding_vd, TARGET.module.head_vd))
  regression, classification, total = 0.0, 0.0, 1e-5
  for row, length in enumerate(BATCH.lengths_b):
    f, tokens = teacher().features['final_btd'][row], BATCH.tokens_bt[row]
    read, predicted, _ = drafts.eagle_step(p, config, table[tokens[1:length]], f[:length - 1],
                                           np.arange(length - 1))
    for t in range(length - 1):  # the last position of a row has no target
      if BATCH.loss_mask_bt[row, t]:  # that of token t itself: not shifted
        law = np.exp(log_softmax(head @ f[t + 1]))
        regression += smooth_l1(predicted[t] - f[t + 1])
        classification -= np.sum(law * log_softmax(head @ read[t]))
        total += 1
  return (regression + 0.1 * classification) / total


def reference_eagle3():
  """Explicit drafting: from every position, step by step, on the row's own tokens."""
  p, config = drafts.numbers(draft('eagle3').module), draft('eagle3').config
  table, head = (np.asarray(x[...], np.float64)
                 for x in (TARGET.module.embedding_vd, TARGET.module.head_vd))
  ids, total = list(drafts.DRAFT_IDS), 0.0
  for row, length in enumerate(BATCH.lengths_b):
    tokens, output = BATCH.tokens_bt[row], teacher().features
    carried = output['captured_btw'][row] @ p['fusion_dw'].T
    for t in range(length - 1):
      read, out, slots = drafts.eagle3_step(p, config, table[tokens[1:t + 2]], carried[:t + 1],
                                            np.arange(t + 1))
      read, out = read[-1], out[-1:]
      for k in range(config.unrolled_steps):
        if k:
          if t + 1 + k >= length:
            break
          one, out, slots = drafts.eagle3_step(p, config, table[tokens[t + 1 + k]][None], out,
                                               [t + k], slots)
          read = one[0]
        logits = head @ output['final_btd'][row, t + 1 + k]
        if BATCH.loss_mask_bt[row, t + k] and np.argmax(logits) in ids:
          law = np.exp(log_softmax(logits[ids]))
          total -= 0.8 ** k * np.sum(law * log_softmax(p['head_vd'] @ read))
  return total / BATCH.tokens_bt.size  # the mean over all positions, padding included


@KINDS
def test_the_loss_is_that_of_the_papers(kind):
  """For EAGLE-3 so unrolled attention equals step-by-step drafting on the same tokens."""
  totals = LOSSES(FEATURE, draft(kind).module, TARGET.module, BATCH)
  expected = reference_eagle3() if kind == 'eagle3' else reference_eagle(kind)
  np.testing.assert_allclose(totals.loss, expected, rtol=1e-5)
  assert 0 < totals.alpha < 1
  assert totals.num_tokens == np.sum(BATCH.loss_mask_bt[:, :-1]
                                     * (np.arange(1, 9) < BATCH.lengths_b[:, None]))


def test_rematerialised_steps_give_the_same_gradient():
  loss = lambda module: step.losses(FEATURE, module, TARGET.module, BATCH).loss_sum
  again = drafts.tiny('eagle3', TARGET, remat='full').module
  found = key_tables.by_path(jax.jit(jax.grad(loss))(again))
  for name, grad in gradient('eagle3').items():
    np.testing.assert_allclose(found[name], grad, rtol=1e-4, atol=1e-4, err_msg=name)
  assert 'remat' in str(jax.make_jaxpr(jax.grad(loss))(again))


@functools.cache
def gradient(kind, **weights):
  """By name, of the loss with some of its weights changed."""
  module = drafts.tiny(kind, TARGET, **weights).module
  loss = lambda module: step.losses(FEATURE, module, TARGET.module, BATCH).loss_sum
  return key_tables.by_path(jax.jit(jax.grad(loss))(module))


def test_every_loss_term_reaches_the_parameters_it_owns_and_no_others():
  """Partial alignment: each half of the last matrix has a term of its own, the rest has both."""
  d = TARGET.config.width
  for weights, owned, foreign in (
      (dict(regression_weight=0.0), slice(0, d), slice(d, None)),
      (dict(classification_weight=0.0), slice(d, None), slice(0, d))):
    grads = gradient('fspad', **weights)
    down_df = np.asarray(grads.pop('mlp/down_df'))
    assert np.abs(down_df[owned]).max() > 1e-3 and not np.any(down_df[foreign])
    for name, grad in grads.items():
      assert np.abs(np.asarray(grad)).max() > 1e-4, (weights, name)


def test_every_parameter_of_eagle3_learns_and_later_steps_reach_the_first():
  for name, grad in gradient('eagle3').items():
    assert np.abs(np.asarray(grad)).max() > 1e-4, name
  module = draft('eagle3').module

  def last_step_alone(module):
    steps = module.unroll(TARGET.module, BATCH)
    return features.feature_loss(
        FEATURE, steps[-1:], module.head, TARGET.module.logits, module.restrict,
        **module.loss_settings | dict(decay=1.0)).loss_sum

  # The map on the target's features is used by the first step only.
  assert np.abs(jax.jit(jax.grad(last_step_alone))(module).fusion_dw[...]).max() > 1e-4


@KINDS
def test_no_gradient_reaches_the_teacher(kind):
  grads = jax.jit(jax.grad(lambda target: step.losses(
      FEATURE, draft(kind).module, target, BATCH).loss_sum))(TARGET.module)
  jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)


@KINDS
def test_padding_and_what_it_holds_do_not_matter(kind):
  real = np.arange(9) < BATCH.lengths_b[:, None]
  other = BATCH.replace(tokens_bt=np.where(real, BATCH.tokens_bt, 7))
  first, second = (LOSSES(FEATURE, draft(kind).module, TARGET.module, rows)
                   for rows in (BATCH, other))
  np.testing.assert_allclose(first.loss_sum, second.loss_sum, rtol=1e-6)


@pytest.mark.parametrize('kind, name', [('eagle', 'forward_kl'), ('eagle3', 'lk_hybrid')])
def test_divergences_hold_for_feature_drafts_too(kind, name):
  objective = objectives.Objective(name, normalisation='token')
  loss = lambda module: step.losses(objective, module, TARGET.module, BATCH).loss
  value, grads = jax.jit(jax.value_and_grad(loss))(draft(kind).module)
  assert 0 < value < 20
  reached = {leaf for leaf, grad in key_tables.by_path(grads).items() if np.any(np.asarray(grad))}
  assert 'fusion_dw' in reached and 'mlp/down_df' in reached
  if name == 'forward_kl' and kind == 'eagle':  # the soft cross-entropy less the teacher's entropy
    released = drafts.tiny(kind, TARGET, regression_weight=0.0, classification_weight=1.0)
    cross = LOSSES(FEATURE, released.module, TARGET.module, BATCH)
    mask_bt = np.asarray(feature_config.pair_mask(BATCH))
    law = jax.nn.log_softmax(teacher().logits_btv[:, 1:])
    entropy = -np.sum(np.sum(np.exp(law) * law, axis=-1) * mask_bt[:, :-1]) / mask_bt.sum()
    np.testing.assert_allclose(value, cross.loss - entropy, rtol=1e-4)


@pytest.mark.parametrize('kind', ['fspad', 'eagle3'])
def test_micro_batches_chunks_of_the_head_and_devices_add_up_to_the_one_large_batch(kind):
  """By the number of supervised positions, and by that of all positions, however they fall.

  Micro-batches of two rows, one a device, heads over four positions at a time; heads, MLP and
  vocabulary are split over two devices.
  """
  mesh = sharding.make_mesh(fsdp=2, tensor=2, data=1, devices=jax.devices()[:4])
  place = lambda module: jax.device_put(module, sharding.parameter_shardings(module, mesh))
  batch = jax.device_put(BATCH, sharding.batch_sharding(mesh))

  @jax.jit
  def gradients(student, teacher, batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return step.gradients(FEATURE, student, teacher, batch, first=0, mesh=mesh,
                            dropout_key=None, accumulation=2, chunk=4)

  grads, totals = gradients(place(draft(kind).module), place(TARGET.module), batch)
  whole = LOSSES(FEATURE, draft(kind).module, TARGET.module, BATCH)
  for name in ('loss', 'alpha', 'num_tokens', 'weight'):
    np.testing.assert_allclose(getattr(totals, name), getattr(whole, name), rtol=1e-5)
  for name, grad in key_tables.by_path(grads).items():
    np.testing.assert_allclose(grad, gradient(kind)[name] / whole.weight, rtol=1e-4, atol=1e-5,
                               err_msg=name)


def test_a_frozen_head_gets_no_gradient_in_chunks():
  """Its gradient, as large as the head, would be summed up in every chunk for nothing."""
  def made(kind, *shape):
    loss = lambda module, teacher: step.losses(FEATURE, module, teacher, BATCH, chunk=4).loss
    text = str(jax.make_jaxpr(jax.grad(loss))(draft(kind).module, TARGET.module))
    products = [line for line in text.splitlines() if 'dot_general' in line]
    return sum(f':f32[{",".join(map(str, shape))}] = ' in line for line in products)

  assert made('fspad', *TARGET.module.head_vd.shape) == 0
  assert made('eagle3', *draft('eagle3').module.head_vd.shape) > 0


def test_smooth_l1_is_pytorchs():
  z = jnp.array([[[0.3, -0.3, 1.0, -2.5]]])
  expected = (0.045 + 0.045 + 0.5 + 2.0) / 4
  np.testing.assert_allclose(features.smooth_l1(z, jnp.zeros_like(z)), [[expected]], rtol=1e-6)


def test_soft_cross_entropy_leaves_out_what_both_forbid():
  student, taught = jnp.array([[[1.0, 0.0, -jnp.inf]]]), jnp.array([[[0.0, 0.0, -jnp.inf]]])
  np.testing.assert_allclose(features.soft_cross_entropy(student, taught),
                             [[np.log1p(np.e) - 0.5]], rtol=1e-6)


def test_noise_is_uniform_and_shrinks_with_the_row():
  """+-0.1 in a row of 512 tokens, +-0.05 in one of 1024; on inputs only, in training only."""
  features_btd = jnp.zeros((2, 1000, 8))
  noise = np.asarray(fspad.noisy(features_btd, jnp.array([512, 1024]), jax.random.key(0), 0.2))
  for row, bound in enumerate((0.1, 0.05)):
    assert 0.99 * bound < noise[row].max() <= bound and -bound <= noise[row].min() < -0.99 * bound
    np.testing.assert_allclose(noise[row].std(), bound / 3 ** 0.5, rtol=0.03)
    assert abs(noise[row].mean()) < 0.01 * bound
  unroll = jax.jit(lambda module, key: module.unroll(TARGET.module, BATCH, key)[0])
  quiet, loud = (unroll(draft('eagle').module, key) for key in (None, jax.random.key(0)))
  np.testing.assert_array_equal(quiet.taught_btd, loud.taught_btd)
  assert np.abs(quiet.read_btd - loud.read_btd).max() > 1e-3


def test_the_layout_of_an_example():
  """Token t + 1 beside feature t, the feature of t + 1 to be met, the mask of token t."""
  batch = structs.Batch(np.array([[5, 6, 7, 8, 0]]), np.array([[0., 1, 1, 1, 0]]),
                        np.array([1]), np.array([4]))
  assert feature_config.shift_left(batch.tokens_bt, 1).tolist() == [[6, 7, 8, 0, 0]]
  assert feature_config.pair_mask(batch).tolist() == [[0, 1, 1, 0, 0]]


def test_clipping_by_value():
  settings = common.train()
  settings.update(dict(clip_norm=None, clip_value=0.5, optimizer='adamw'))
  rule = state_lib.optimizer(settings)
  # AdamW's first update has the gradient's sign alone: the moments tell what was clipped.
  _, held = rule.update({'x_d': jnp.array([3.0, -0.2])}, rule.init({'x_d': jnp.zeros(2)}),
                        {'x_d': jnp.zeros(2)})
  moment = [leaf for leaf in jax.tree.leaves(held) if leaf.shape == (2,)][0]
  np.testing.assert_allclose(moment, 0.1 * np.array([0.5, -0.2]), rtol=1e-5)
  with pytest.raises(ValueError, match='train.clip_value is 0.0, and must be positive, or None'):
    settings.clip_value = 0.0
    state_lib.check(settings)
