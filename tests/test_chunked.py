"""Head and loss over chunks: the same figures and gradients, without the logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.costs import count
from specdistill_jax.costs import hlo
from specdistill_jax.costs import needed
from specdistill_jax.losses import chunked
from specdistill_jax.losses import objectives
from specdistill_jax.models import layers
from specdistill_jax.training import step

NAMES = (objectives.CROSS_ENTROPY, *objectives.DIVERGENCES)
B, T, D, V = 3, 10, 8, 37
# Three ragged rows; the last has nothing to learn.
MASK = jnp.array([[0, 1, 1, 1, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0, 0, 0, 1], [0] * 10],
                 jnp.float32)


def arrays(shape=(B, T), d=D, v=V):
  """Heads (the teacher is twice as wide), features of both, and labels."""
  keys = jax.random.split(jax.random.key(0), 5)
  normal = lambda index, shape: jax.random.normal(keys[index], shape)
  return dict(student_vd=normal(0, (v, d)), teacher_vd=normal(1, (v, 2 * d)),
              student_btd=normal(2, (*shape, d)), teacher_btd=normal(3, (*shape, 2 * d)),
              labels_bt=jax.random.randint(keys[4], shape, 0, v))


def head(weight_vd):
  return lambda x_btd: layers.soft_cap(layers.linear(x_btd, weight_vd), 5.0)


def totals(objective, a, mask_bt=MASK, chunk=None, **options):
  features = head(a['student_vd']), a['student_btd']
  if not objective.needs_teacher:
    return chunked.supervised(objective, *features, a['labels_bt'], mask_bt, chunk=chunk)
  return chunked.distillation(objective, *features, head(a['teacher_vd']), a['teacher_btd'],
                              mask_bt, chunk=chunk, **options)


@functools.partial(jax.jit, static_argnums=(0, 3))
def figures(objective, a, mask_bt, chunk):
  """Totals, and the gradient of the loss on everything that is a float."""
  labels_bt = a['labels_bt']
  def loss(a):
    found = totals(objective, a | dict(labels_bt=labels_bt), mask_bt, chunk)
    return found.loss, found
  floats = {name: x for name, x in a.items() if name != 'labels_bt'}
  return jax.grad(loss, has_aux=True)(floats)[::-1]


def assert_close(found, expected, **tolerance):
  tolerance = tolerance or dict(rtol=1e-5, atol=1e-5)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected),
                          strict=True):
    np.testing.assert_allclose(x, y, **tolerance, err_msg=jax.tree_util.keystr(path))


@functools.cache
def direct(objective):
  return figures(objective, arrays(), MASK, None)


@pytest.mark.parametrize('name, chunk, normalisation', [
    *((name, 4, 'sequence') for name in NAMES), ('jsd', 5, 'token'), ('lk_hybrid', 1, 'token'),
    ('forward_kl', 64, 'sequence')])
def test_values_and_gradients_are_those_of_whole_logits(name, chunk, normalisation):
  """Chunks that divide a row and that don't; softcapped heads, and a warm loss."""
  objective = objectives.Objective(name, beta=0.3, normalisation=normalisation, temperature=1.5)
  found, expected = figures(objective, arrays(), MASK, chunk), direct(objective)
  assert_close(found, expected)
  assert np.abs(found[1]['student_vd']).max() > 1e-3
  np.testing.assert_array_equal(found[1]['teacher_vd'], 0)
  np.testing.assert_array_equal(found[1]['teacher_btd'], 0)


@pytest.mark.parametrize('chunk', [None, 4])
@pytest.mark.parametrize('name', ['cross_entropy', 'forward_kl', 'lk_hybrid'])
def test_masked_features_reach_neither_value_nor_gradient(name, chunk):
  """A NaN there times a gradient of zero would be NaN in the head's gradient."""
  objective = objectives.Objective(name, normalisation='token')
  plain = arrays()
  hole = lambda x: jnp.where(MASK[..., None] > 0, x, jnp.nan)
  holed = plain | {name: hole(plain[name]) for name in ('student_btd', 'teacher_btd')}
  found, expected = (figures(objective, a, MASK, chunk) for a in (holed, plain))
  assert_close(found, expected, rtol=0, atol=0)
  np.testing.assert_array_equal(found[1]['student_btd'][MASK == 0], 0)


def test_loss_of_a_part_is_weighed_by_the_alpha_of_the_whole():
  """The mixture of lk_hybrid was that of the micro-batch."""
  objective = objectives.Objective('lk_hybrid')
  whole = direct(objective)[0]
  rows = lambda x, i: x[i:i + 1] if x.shape[0] == B else x
  for chunk in (None, 4):
    parts = [totals(objective, {name: rows(x, i) for name, x in arrays().items()},
                    MASK[i:i + 1], chunk, alpha=whole.alpha) for i in range(B)]
    assert_close(jax.tree.map(lambda *xs: sum(xs), *parts), whole)


VOCAB = 64  # over two devices


def batch(rows=8, width=12):
  rng = np.random.default_rng(0)
  lengths = rng.integers(6, width + 1, rows).astype(np.int32)
  prompts = rng.integers(2, 5, rows).astype(np.int32)
  position = np.arange(width)[None]
  tokens = rng.integers(2, models.VOCAB, (rows, width))
  mask = (position >= prompts[:, None]) & (position < lengths[:, None])
  return structs.Batch(tokens.astype(np.int32), mask.astype(np.float32), prompts, lengths)


DECODERS = {
    'tied': dict(num_layers=1), 'untied': dict(num_layers=1, tie_embeddings=False),
    'softcap and padding': dict(num_layers=1, logit_softcap=3.0, vocab_padding=5)}


@functools.cache
def pair(kind):
  with jax.ensure_compile_time_eval():
    if kind.startswith('t5'):
      options = dict(num_encoder_layers=1, num_decoder_layers=1, tie_embeddings='un' not in kind)
      return tuple(models.tiny_t5(seed, **options).module for seed in (0, 1))
    options = DECODERS.get(kind) or dict(num_layers=1, vocab_size=VOCAB)
    return tuple(models.tiny(seed, **options).module for seed in (0, 1))


@pytest.mark.parametrize('kind', [*DECODERS, 't5', 't5 untied'])
def test_models_learn_the_same(kind):
  objective = objectives.Objective('lk_hybrid')
  student, teacher = pair(kind)
  @functools.partial(jax.jit, static_argnums=1)
  def gradient(student, chunk):
    def loss(student):
      found = step.losses(objective, student, teacher, batch(), chunk=chunk)
      return found.loss, found
    return jax.grad(loss, has_aux=True)(student)
  found, expected = gradient(student, 5), gradient(student, None)
  assert_close(found, expected)
  used = student.embedding_vd if student.head_vd is None else student.head_vd
  assert used is not None and max(np.abs(x).max() for x in jax.tree.leaves(found[0])) > 1e-3


def gradients(name, sizes, *, chunk, accumulation):
  """Gradient and totals of a batch on a mesh."""
  devices = jax.devices()[:int(np.prod(list(sizes.values())))]
  mesh = sharding.make_mesh(**sizes, devices=devices)
  place = lambda module: jax.device_put(module, sharding.parameter_shardings(module, mesh))
  def function(student, teacher, batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return step.gradients(objectives.Objective(name), student, teacher, batch, None,
                            accumulation=accumulation, first=0, mesh=mesh, chunk=chunk)
  student, teacher = map(place, pair('vocabulary of two devices'))
  return jax.jit(function), (student, teacher,
                             jax.device_put(batch(), sharding.batch_sharding(mesh)))


ONE, EIGHT = dict(data=1), dict(data=2, fsdp=2, tensor=2)


@functools.cache
def on_one_device(name):
  function, arguments = gradients(name, ONE, chunk=None, accumulation=1)
  return jax.device_get(function(*arguments))


@pytest.mark.parametrize('name, sizes, chunk, accumulation', [
    ('lk_hybrid', ONE, None, 4), ('lk_hybrid', ONE, 5, 4), ('lk_hybrid', EIGHT, 5, 1),
    ('lk_hybrid', EIGHT, 5, 2), ('forward_kl', EIGHT, 5, 1)])
def test_devices_and_micro_batches_give_the_gradient_of_one_large_batch(
    name, sizes, chunk, accumulation):
  function, arguments = gradients(name, sizes, chunk=chunk, accumulation=accumulation)
  assert_close(jax.device_get(function(*arguments)), on_one_device(name))


def test_heads_are_gathered_and_their_gradient_added_up_once():
  """Left to the compiler, each chunk's turn did both: 37 GB a step of a 1B student on a slice."""
  function, arguments = gradients('forward_kl', EIGHT, chunk=3, accumulation=1)
  text = function.lower(*arguments).compile().as_text()
  inside = [o for o in count.operations(hlo.parse(text), 1) if o.kind and o.times == 4]
  assert inside, 'the softmax of a vocabulary on two devices needs its sums'
  weights = VOCAB // 2 * 16 * 4
  assert max(o.wire_bytes for o in inside) < weights / 4
