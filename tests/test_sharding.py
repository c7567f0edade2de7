"""Layouts: names to mesh axes, and what stays split all the way through the loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import models
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.costs import count
from specdistill_jax.costs import hlo
from specdistill_jax.losses import objectives
from specdistill_jax.models import cache
from specdistill_jax.models import decoder
from specdistill_jax.training import step

ROWS, WIDTH, VOCAB = 4, 16, 1024  # no other product has the size of the head's


def specs(shapes, mesh, layout='sharded'):
  """PartitionSpecs by the names of parameters."""
  found = jax.tree_util.tree_leaves_with_path(sharding.parameter_shardings(shapes, mesh, layout))
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf.spec
          for path, leaf in found}


@pytest.mark.parametrize('layout, query, embedding', [
    ('sharded', P(None, 'tensor', None, 'fsdp'), P('tensor', 'fsdp')),
    ('tensor', P(None, 'tensor', None, None), P('tensor', None)),
    ('replicated', P(None, None, None, None), P(None, None))])
def test_layouts(layout, query, embedding):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shapes = jax.eval_shape(lambda: models.tiny(vocab_size=VOCAB).module)
  found = specs(shapes, mesh, layout)
  assert found['layers/attention/query_nhd/value'] == query
  assert found['embedding_vd/value'] == embedding


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device of a job on several slices, as far as a mesh asks."""
  id: int
  slice_index: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'
  process_index: int = 0


def test_between_slices_only_data_travel():
  chips = [Chip(index, index // 4) for index in (5, 0, 7, 1, 4, 2, 6, 3)]
  mesh = sharding.make_mesh(data=4, fsdp=1, tensor=2, devices=chips)
  assert [{chip.slice_index for chip in row.ravel()} for row in mesh.devices] == [
      {0}, {0}, {1}, {1}]
  with pytest.raises(ValueError, match='data=1 on 2 slices; it must be a multiple'):
    sharding.make_mesh(data=1, fsdp=8, devices=chips)


def test_a_mesh_regrouped_keeps_its_devices_in_their_order():
  mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
  assert sharding.regrouped(mesh, None) is mesh
  found = sharding.regrouped(mesh, 2)
  assert dict(found.shape) == dict(data=2, fsdp=2, tensor=2)
  assert list(found.devices.ravel()) == list(mesh.devices.ravel())
  with pytest.raises(ValueError, match='rollout.tensor is 3; it must divide .*, 4'):
    sharding.regrouped(mesh, 3)


def test_a_dimension_that_does_not_divide_stays_whole():
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=8)
  shapes = jax.eval_shape(lambda: models.tiny(num_heads=4, num_kv_heads=2, mlp_width=24).module)
  found = specs(shapes, mesh)
  assert found['layers/attention/query_nhd/value'] == P(None, None, None, 'fsdp')
  assert found['layers/mlp/up_fd/value'] == P(None, 'tensor', 'fsdp')


def test_only_matrices_change_their_dtype():
  module = models.tiny(attention_bias=True).module
  found = sharding.matrices_in(module, 'bfloat16')
  assert found.layers.attention.query_nhd[...].dtype == jnp.bfloat16
  assert found.layers.attention.query_bias_nh[...].dtype == jnp.float32
  assert found.layers.attention_norm.scale_d[...].dtype == jnp.float32


def test_caches_are_laid_out_like_heads_and_rows():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  make = jax.jit(lambda: cache.init_cache(1, ROWS, 8, 2, 4, jnp.float32))
  with jax.set_mesh(mesh):
    assert make().keys_bksh[0].sharding.spec == P(('data', 'fsdp'), 'tensor')
  assert cache.init_cache(1, 1, 8, 2, 4, jnp.float32).num_slots == 8  # and without a mesh


@functools.cache
def operations_of_the_gradient():
  """Collectives and kernels of a distillation gradient whose vocabulary is over all devices."""
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=8)
  shapes = jax.eval_shape(lambda: decoder.init(
      models.config(num_layers=1, vocab_size=VOCAB), jax.random.key(0)))
  laid_out = jax.tree.map(
      lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
      shapes, sharding.parameter_shardings(shapes, mesh))
  replicated = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.replicated(mesh))
  batch = structs.Batch(
      replicated((ROWS, WIDTH), jnp.int32), replicated((ROWS, WIDTH), jnp.float32),
      replicated((ROWS,), jnp.int32), replicated((ROWS,), jnp.int32))
  loss = lambda student, teacher, batch: step.losses(
      objectives.Objective('forward_kl'), student, teacher, batch).loss_sum
  with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss)).lower(laid_out, laid_out, batch).compile().as_text()
  return count.operations(hlo.parse(text), 1)


def test_logits_stay_split_by_vocabulary_through_the_loss():
  """No chip ever gets a whole row of logits: what travels is far smaller."""
  logits = ROWS * WIDTH * VOCAB * 4
  largest = max(o.wire_bytes for o in operations_of_the_gradient() if o.kind)
  assert 0 < largest < logits / 2


def test_the_vocabulary_is_worked_on_once():
  """Each chip does an eighth of the head's products, forward twice and backward twice."""
  head = 2 * ROWS * WIDTH * 16 * VOCAB
  done = [o.flops for o in operations_of_the_gradient() if o.flops == head / 8]
  assert len(done) == 4
  assert not [o for o in operations_of_the_gradient() if o.flops >= head]


def gradient_over(num_devices):
  """Operations of one device that has two rows of a batch spread over `num_devices`."""
  mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
  shapes = jax.eval_shape(lambda: decoder.init(
      models.config(num_layers=1, tie_embeddings=False), jax.random.key(0)))
  laid_out = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)), shapes)
  spread = functools.partial(jax.ShapeDtypeStruct, sharding=sharding.batch_sharding(mesh))
  rows = 2 * num_devices
  batch = structs.Batch(spread((rows, WIDTH), jnp.int32), spread((rows, WIDTH), jnp.float32),
                        spread((rows,), jnp.int32), spread((rows,), jnp.int32))
  loss = lambda student, batch: step.losses(
      objectives.Objective(), student, None, batch).loss_sum
  with jax.set_mesh(mesh):
    gradient = jax.jit(jax.grad(loss), out_shardings=sharding.replicated(mesh))
    text = gradient.lower(laid_out, batch).compile().as_text()
  weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
  return count.operations(hlo.parse(text), 1), weights


def test_a_device_does_as_much_among_many_as_among_few():
  """As many rows a device: only the sum of gradients grows, by the ring's (n - 1) / n."""
  (few, weights), (many, _) = gradient_over(2), gradient_over(8)
  products = lambda operations: sum(o.flops * o.times for o in operations)
  assert products(few) == products(many)
  for operations, devices in ((few, 2), (many, 8)):
    joined = [o for o in operations if o.kind]
    assert {(o.kind, o.group) for o in joined} == {('all-reduce', devices)}
    sent = sum(o.wire_bytes for o in joined)
    assert sent == pytest.approx(2 * (devices - 1) / devices * weights, rel=0.05)


def test_eight_devices_compute_the_loss_of_one():
  batch = structs.Batch(
      np.arange(ROWS * WIDTH, dtype=np.int32).reshape(ROWS, WIDTH) % VOCAB,
      np.ones((ROWS, WIDTH), np.float32), np.full(ROWS, 4, np.int32),
      np.full(ROWS, WIDTH, np.int32))
  student, teacher = (models.tiny(seed, vocab_size=VOCAB).module for seed in (0, 1))
  loss = jax.jit(lambda s, t: step.losses(
      objectives.Objective('jsd'), s, t, batch).loss)
  expected = loss(student, teacher)
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=8)
  place = lambda m: jax.device_put(m, sharding.parameter_shardings(m, mesh))
  with jax.set_mesh(mesh):
    np.testing.assert_allclose(loss(place(student), place(teacher)), expected, rtol=1e-5)
