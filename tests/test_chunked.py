"""Head and loss over chunks: the same figures and gradients, without the logits."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

import compiler
import models
from specdistill_jax import row_sharding
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.costs import count
from specdistill_jax.costs import hlo
from specdistill_jax.costs import needed
from specdistill_jax.losses import chunked
from specdistill_jax.losses import objectives
from specdistill_jax.models import layers
from specdistill_jax.training import step

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


# Chunks that divide a row's ten positions and that don't; each normalisation, and a warm loss.
CASES = {name: (objectives.Objective(name, beta=0.3, temperature=1.5, normalisation=normalisation),
                chunk)
         for name, chunk, normalisation in [
             ('cross_entropy', 4, 'sequence'), ('forward_kl', 5, 'token'),
             ('lk_hybrid', 4, 'sequence'), ('end_to_end_tvd', 7, 'token')]}


# The closed forms of all are in test_lk_losses.py.
@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients_are_those_of_whole_logits(name):
  objective, chunk = CASES[name]
  found, expected = (figures(objective, arrays(), MASK, c) for c in (chunk, None))
  assert_close(found, expected)
  assert np.abs(found[1]['student_vd']).max() > 1e-3
  np.testing.assert_array_equal(found[1]['teacher_vd'], 0)
  np.testing.assert_array_equal(found[1]['teacher_btd'], 0)


@pytest.mark.parametrize('name', ['cross_entropy', 'forward_kl', 'lk_hybrid'])
def test_masked_features_reach_neither_value_nor_gradient(name):
  """A NaN there times a gradient of zero would be NaN in the head's gradient."""
  objective, chunk = CASES[name]
  plain = arrays()
  hole = lambda x: jnp.where(MASK[..., None] > 0, x, jnp.nan)
  holed = plain | {name: hole(plain[name]) for name in ('student_btd', 'teacher_btd')}
  for form in (None, chunk):
    found, expected = (figures(objective, a, MASK, form) for a in (holed, plain))
    assert_close(found, expected, rtol=0, atol=0)
    np.testing.assert_array_equal(found[1]['student_btd'][MASK == 0], 0)


def sliding(positions=3):
  """Arrays of several draft positions, held to laws of the same tokens, and a mask of them."""
  a, behind = arrays(), lambda x, n: jnp.pad(x, ((0, 0), (0, n)) + ((0, 0),) * (x.ndim - 2))[:, n:]
  every = lambda x: jnp.stack([behind(x, n) for n in range(positions)], axis=2)
  return a | dict(student_btd=jax.random.normal(jax.random.key(1), (B, T, positions, D)),
                  teacher_btd=every(a['teacher_btd'])), every(MASK)


@pytest.mark.parametrize('name', ['forward_kl', 'lk_hybrid'])
@pytest.mark.parametrize('chunk', [None, 3, 9, 12])  # one, three and four of ten places at a time
def test_a_law_that_several_positions_are_held_to_is_computed_once(name, chunk):
  objective = objectives.Objective(name)
  a, mask = sliding()

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(once, student_vd, student_btd):
    teacher = head(a['teacher_vd'])
    def loss(student_vd, student_btd):
      return chunked.distillation(
          objective, head(student_vd), student_btd, chunked.Sliding(teacher) if once else teacher,
          jnp.where(mask[..., None] > 0, a['teacher_btd'], jnp.nan), mask, chunk=chunk).loss
    return jax.value_and_grad(loss, argnums=(0, 1))(student_vd, student_btd)

  student = a['student_vd'], a['student_btd']
  found, expected = (gradient(once, *student) for once in (True, False))
  assert_close(found, expected)
  assert np.abs(found[1][0]).max() > 1e-3
  products = lambda once: needed.flops(
      jax.make_jaxpr(gradient, static_argnums=0)(once, *student), 1)
  places = {None: [10], 3: 10 * [1], 9: 4 * [3], 12: 3 * [4]}[chunk]
  spared = sum(3 * n - (n + 2) for n in places) * (
      2 if name == 'lk_hybrid' and chunk is not None else 1)
  assert products(False) - products(True) == 2 * spared * B * V * 2 * D


def test_loss_of_a_part_is_weighed_by_the_alpha_of_the_whole():
  """The mixture of lk_hybrid was that of the micro-batch."""
  objective, _ = CASES['lk_hybrid']
  whole = figures(objective, arrays(), MASK, None)[0]
  rows = lambda x, i: x[i:i + 1] if x.shape[0] == B else x
  for chunk in (None, 4):
    parts = [totals(objective, {name: rows(x, i) for name, x in arrays().items()},
                    MASK[i:i + 1], chunk, alpha=whole.alpha) for i in range(B)]
    assert_close(jax.tree.map(lambda *xs: sum(xs), *parts), whole)


DECODERS = {
    'tied': dict(), 'untied': dict(tie_embeddings=False),
    'softcap and padding': dict(logit_softcap=3.0, vocab_padding=5)}


@functools.cache
def pair(kind='', **options):
  """A student and a teacher."""
  with jax.ensure_compile_time_eval():
    if kind.startswith('t5'):
      options = dict(num_encoder_layers=1, num_decoder_layers=1, tie_embeddings='un' not in kind)
      return tuple(models.tiny_t5(seed, **options).module for seed in (0, 1))
    return tuple(models.tiny(seed, num_layers=1, **DECODERS.get(kind, options)).module
                 for seed in (0, 1))


@pytest.mark.parametrize('kind', [*DECODERS, 't5', 't5 untied'])
def test_heads_of_models_learn_the_same(kind):
  """They are methods of modules, whose weights the loss finds by itself."""
  student, teacher = pair(kind)
  features_btd = jax.random.normal(jax.random.key(0), (B, T, 16))
  @functools.partial(jax.jit, static_argnums=2)
  def gradient(student, features_btd, chunk):
    loss = lambda student, x_btd: chunked.distillation(
        objectives.Objective('forward_kl'), student.logits, x_btd, teacher.logits, features_btd,
        MASK, chunk=chunk).loss
    return jax.grad(loss, argnums=(0, 1))(student, features_btd)
  found, expected = (gradient(student, features_btd, chunk) for chunk in (4, None))
  assert_close(found, expected)
  used = found[0].embedding_vd if found[0].head_vd is None else found[0].head_vd
  assert np.abs(used[...]).max() > 1e-3


VOCAB = 64  # over two devices


def batch(rows=8, width=12):
  rng = np.random.default_rng(0)
  lengths = rng.integers(6, width + 1, rows).astype(np.int32)
  prompts = rng.integers(2, 5, rows).astype(np.int32)
  position = np.arange(width)[None]
  tokens = rng.integers(2, VOCAB, (rows, width))
  mask = (position >= prompts[:, None]) & (position < lengths[:, None])
  return structs.Batch(tokens.astype(np.int32), mask.astype(np.float32), prompts, lengths)


@functools.cache
def gradients(data, fsdp, tensor, *, chunk, accumulation, width=12):
  """Gradient and totals of a batch on a mesh, and the program that computed them.

  Rows of 12 are moved to where the heads are, heads to where rows of 48 are.
  """
  mesh = sharding.make_mesh(data, fsdp, tensor, jax.devices()[:data * fsdp * tensor])
  place = lambda module: jax.device_put(module, sharding.parameter_shardings(module, mesh))
  def function(student, teacher, batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return step.gradients(objectives.Objective('lk_hybrid'), student, teacher, batch, None,
                            accumulation=accumulation, first=0, mesh=mesh, chunk=chunk)
  arguments = (*map(place, pair(vocab_size=VOCAB)),
               jax.device_put(batch(width=width), sharding.batch_sharding(mesh)))
  compiled = jax.jit(function).lower(*arguments).compile()
  return compiled(*arguments), compiled.as_text()


@pytest.mark.parametrize('sizes, chunk, accumulation, width', [
    ((2, 2, 2), 5, 1, 12), ((1, 8, 1), 3, 2, 12),
    ((2, 2, 2), 3, 1, 48)])
def test_devices_and_micro_batches_give_the_gradient_of_one_large_batch(
    sizes, chunk, accumulation, width):
  expected, _ = gradients(1, 1, 1, chunk=None, accumulation=1, width=width)
  found, _ = gradients(*sizes, chunk=chunk, accumulation=accumulation, width=width)
  assert_close(found, expected)


def test_figures_are_whole_on_every_device_for_its_host_to_read():
  """Where there are as many draft positions as devices, each had one of them."""
  mesh = sharding.make_mesh(1, 4, 1, jax.devices()[:4])
  def sums(whole, rows):
    return dict(figures=jnp.sum(rows, axis=0), head=rows.T @ rows), None
  rows = jnp.arange(32.).reshape(8, 4)
  with jax.set_mesh(mesh):
    found, _ = jax.jit(row_sharding.over_rows(sums))(
        (), jax.device_put(rows, NamedSharding(mesh, PartitionSpec('fsdp'))))
  assert found['figures'].is_fully_replicated and not found['head'].is_fully_replicated
  assert_close(found, sums((), rows)[0])


def inside_loop(text, turns):
  """What is communicated in each of its turns."""
  inside = [o for o in count.operations(hlo.parse(text), 1) if o.kind and o.times == turns]
  assert inside, 'a softmax over two devices adds up in each turn'
  return inside


WEIGHTS = VOCAB / 2 * 16 * 4  # bytes of a device; of eight in (2, 2, 2) it gathers half of them


def test_heads_are_gathered_and_their_gradient_added_up_once():
  """Left to the compiler, each chunk's turn did both."""
  _, text = gradients(2, 2, 2, chunk=3, accumulation=1, width=48)
  # A chunk of 3 positions: of the device's own two rows, and of half the vocabulary.
  assert re.search(r'f32\[2,3,(1,)?32\]', text)
  assert max(o.wire_bytes for o in inside_loop(text, 16)) < WEIGHTS / 2


def test_heads_that_are_larger_than_the_rows_stay_where_they_are():
  """Gathered heads and their gradients were most of a step's memory."""
  _, text = gradients(2, 2, 2, chunk=5, accumulation=1)
  # A chunk of 4 positions: of the four rows of both fsdp devices, and of a quarter.
  assert re.search(r'f32\[4,4,(1,)?16\]', text)
  part = 4 * 4 * 16 * 4  # bytes of its features
  assert 0 < max(o.wire_bytes for o in inside_loop(text, 3)) <= 2 * part


@pytest.mark.parametrize('name', ['forward_kl', 'lk_hybrid'])
def test_a_draft_of_some_tokens_learns_the_same_on_devices(name):
  """32 of 64, both split over eight devices, from which the teacher's are picked."""
  objective, picked = objectives.Objective(name, normalisation='token'), jnp.arange(1, 64, 2)
  made = arrays(shape=(8, 6), d=8, v=64) | dict(
      student_vd=jax.random.normal(jax.random.key(8), (32, 8)))

  def gradient(mesh, chunk):
    def head(weight_vd):
      return lambda x_btd: sharding.constrain(
          layers.linear(row_sharding.for_head(x_btd), weight_vd), 'btv')
    def loss(a):
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = chunked.distillation(
            objective, head(a['student_vd']), a['student_btd'], head(a['teacher_vd']),
            a['teacher_btd'], jnp.ones((8, 6)), chunk=chunk, over_rows=row_sharding.over_rows,
            restrict=lambda logits: logits[..., picked])
      return found.loss, found
    place = {name: NamedSharding(mesh, PartitionSpec(
        *((None, 'fsdp') if name.endswith('_vd') else (('data', 'fsdp'),)))) for name in made}
    compiled = jax.jit(jax.grad(loss, has_aux=True, allow_int=True), in_shardings=(place,)).lower(
        made).compile()
    return compiled(made), compiled.as_text()

  expected, _ = gradient(sharding.make_mesh(1, 1, 1, jax.devices()[:1]), None)
  found, text = gradient(sharding.make_mesh(1, 4, 2), 2)
  assert re.search(r'f32\[8,2,(1,)?4\]', text), 'each device has an eighth of the 32 tokens'
  for grads in (found[0], expected[0]):
    grads.pop('labels_bt')
  assert_close(found, expected)
  assert np.abs(found[0]['student_vd']).max() > 1e-3


WIDE = dict(shape=(2, 64), d=16, v=4096)  # logits of 2 MB


def compiled(spec, chunk):
  """The gradient of the loss alone, where there is little but logits."""
  return figures.lower(objectives.from_spec(spec), arrays(**WIDE),
                       jnp.ones(WIDE['shape']), chunk).compile(compiler_options=compiler.USUAL)


@functools.cache
def temporaries(spec, chunk):
  return compiled(spec, chunk).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('spec', [
    *objectives.DIVERGENCES, 'forward_kl,position_weights=adaptive,block=4'])
def test_memory_is_that_of_a_chunk(spec):
  assert temporaries(spec, 4) < temporaries('forward_kl', None) / 4
  assert temporaries(spec, 4) < 1.05 * temporaries('forward_kl', 4)
  logits = re.compile(r'\[2,64,4096\]|\[128,4096\]')
  assert logits.search(compiled('forward_kl', None).as_text())
  assert not logits.search(compiled(spec, 4).as_text())


@pytest.mark.parametrize('name, again', [
    ('cross_entropy', 0), ('jsd', 0), ('lk_hybrid', 1)])
def test_no_product_runs_twice(name, again):
  """Save forward, before anything else, where a loss needs the mean overlap."""
  flops = lambda chunk: needed.flops(jax.make_jaxpr(figures, static_argnums=(0, 3))(
      objectives.Objective(name), arrays(**WIDE), jnp.ones(WIDE['shape']), chunk), 1)
  heads = 2 * 128 * 4096 * (16 + 32)
  assert flops(8) == flops(None) + again * heads
