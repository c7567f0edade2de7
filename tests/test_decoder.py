"""The decoder: causal, the same incrementally as in full, and built as its config says."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from specdistill_jax import sharding
from specdistill_jax.decoding import state as state_lib
from specdistill_jax.models import decoder
from specdistill_jax.models import layers
import models


@jax.jit
def causal(module, tokens_bt, dropout_key=None):
  return module.causal(tokens_bt, dropout_key=dropout_key)


@pytest.mark.parametrize('family', models.FAMILIES)
def test_incremental_equals_full_forward_over_ragged_rows(family):
  """Blocks of several sizes, with wrong tokens fed and rolled back, row by row."""
  model = models.tiny(3, **models.FAMILIES[family])
  tokens_bt = jax.random.randint(jax.random.key(1), (3, 12), 0, models.VOCAB)
  full = causal(model.module, tokens_bt)
  unrolled = model.module.unstacked()
  slots = 20
  feed = jax.jit(lambda module, tokens, cache: module(
      tokens, *state_lib.block_positions(cache.length_b, tokens.shape[1], slots), cache))
  cache = unrolled.init_cache(3, slots)
  rng = np.random.default_rng(0)
  while int(cache.length_b.min()) < 12:
    before_b = np.asarray(cache.length_b)
    block = int(rng.choice([1, 4]))
    good_b = rng.integers(0, block + 1, size=3)  # tokens of the block that are kept
    index_bt = before_b[:, None] + np.arange(block)
    right_bt = np.take_along_axis(np.asarray(tokens_bt), np.minimum(index_bt, 11), axis=1)
    keep_bt = (np.arange(block) < good_b[:, None]) & (index_bt < 12)
    fed_bt = np.where(keep_bt, right_bt, rng.integers(0, models.VOCAB, size=(3, block)))
    output = feed(unrolled, jnp.asarray(fed_bt), cache)
    for row in range(3):
      for t in range(int(keep_bt[row].sum())):
        np.testing.assert_allclose(output.logits_btv[row, t],
                                   full.logits_btv[row, before_b[row] + t], atol=2e-5)
        np.testing.assert_allclose(output.features['final_btd'][row, t],
                                   full.features['final_btd'][row, before_b[row] + t], atol=2e-5)
    cache = output.cache.rollback(jnp.asarray(before_b + keep_bt.sum(axis=1)))


@pytest.mark.parametrize('family', models.FAMILIES)
def test_causality_by_gradient(family):
  """The logits at t depend on the embeddings at 0..t and on none after; windows cut the past."""
  model = models.tiny(0, **models.FAMILIES[family])
  tokens_bt = jnp.arange(2, 12)[None]
  positions_bt, mask_bts = jnp.arange(10)[None], jnp.tril(jnp.ones((10, 10), bool))[None]

  def logit_sum(x_btd, at):
    out, _ = model.module._scanned(x_btd, positions_bt, mask_bts, None)
    return jnp.sum(model.module.logits(model.module.final_norm(out))[:, at] ** 2)

  x_btd = model.module.embed(tokens_bt, positions_bt)
  touched = np.abs(jax.jit(jax.grad(logit_sum), static_argnums=1)(x_btd, 6)).sum(axis=(0, 2)) > 0
  assert touched[:7].all() and not touched[7:].any()


def test_sliding_window_forgets_what_lies_outside():
  model = models.tiny(0, sliding_window=3, global_every=0, num_layers=1)
  tokens = jnp.arange(2, 12)[None]
  changed = tokens.at[0, 2].set(18)
  base, other = (causal(model.module, t).logits_btv[0] for t in (tokens, changed))
  moved = np.abs(base - other).max(axis=-1) > 0
  assert moved.tolist() == [False, False, True, True, True] + [False] * 5


def test_stacked_equals_unstacked_and_unstacking_twice_is_harmless():
  model = models.tiny(0, num_layers=3)
  tokens_bt = jnp.arange(2, 10).reshape(2, 4)
  once = model.module.unstacked()
  np.testing.assert_allclose(causal(model.module, tokens_bt).logits_btv,
                             causal(once, tokens_bt).logits_btv, atol=1e-6)
  assert once.unstacked() is once
  released = models.tiny(0, num_layers=3).module
  again = released.unstacked(release=True)
  jax.tree.map(np.testing.assert_array_equal, again, once)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(released.layers))
  assert not released.embedding_vd[...].is_deleted()


def test_grouped_queries_equal_repeated_keys():
  """4 query heads on 2 key heads is 4 on 4 with each key head repeated for its group."""
  key = jax.random.key(0)
  query, (keys, values) = (jax.random.normal(key, (2, 3, 4, 8)),
                           jax.random.normal(key, (2, 2, 2, 5, 8)))
  mask = jax.random.bernoulli(key, 0.7, (2, 3, 5)).at[:, :, 0].set(True)
  grouped = layers.attend(query, keys, values, mask, scale=0.3)
  whole = layers.attend(query, jnp.repeat(keys, 2, axis=1), jnp.repeat(values, 2, axis=1), mask,
                        scale=0.3)
  np.testing.assert_allclose(grouped, whole, atol=1e-6)


@pytest.mark.parametrize('mask_rows, biased', [('each', True), ('one', False)])
def test_long_rows_attend_a_part_at_a_time(monkeypatch, mask_rows, biased):
  """Values and gradients are those of all queries at once; 11 queries in parts of 4."""
  keys = jax.random.split(jax.random.key(0), 4)
  query, bias = jax.random.normal(keys[0], (2, 11, 4, 8)), jax.random.normal(keys[3], (1, 4, 11, 5))
  held = jax.random.normal(keys[1], (2, 2, 2, 5, 8))
  mask = jax.random.bernoulli(keys[2], 0.7, (2, 11 if mask_rows == 'each' else 1, 5))
  mask = mask.at[:, :, 0].set(True)
  def figures(query, held, bias):
    out = layers.attend(query, *held, mask, scale=0.3, bias_bnts=bias if biased else None)
    return jnp.sum(out ** 2), out
  gradient = jax.grad(figures, argnums=(0, 1, 2), has_aux=True)
  expected = gradient(query, held, bias)
  monkeypatch.setattr(layers, 'MANY_QUERIES', 5)
  monkeypatch.setattr(layers, 'QUERIES_AT_ONCE', 4)
  found = gradient(query, held, bias)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_rope_depends_on_distance_only():
  x = jax.random.normal(jax.random.key(0), (1, 2, 1, 8))
  angles = layers.rope_frequencies(1e4, 8)
  score = lambda shift: jnp.vdot(*layers.rope(x, jnp.asarray([[3, 7]]) + shift, angles)[0])
  np.testing.assert_allclose(score(0), score(1000), atol=1e-3)
  assert abs(float(score(0) - jnp.vdot(*layers.rope(x, jnp.asarray([[3, 8]]), angles)[0]))) > 1e-2


def test_bfloat16_compute_keeps_float32_logits_and_parameters():
  model = models.tiny(0, dtype='bfloat16')
  output = causal(model.module, jnp.arange(8)[None])
  assert output.logits_btv.dtype == jnp.float32
  assert output.features['final_btd'].dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(model.module)} == {jnp.dtype('float32')}
  precise = causal(models.tiny(0).module, jnp.arange(8)[None]).logits_btv
  assert 0 < float(jnp.abs(output.logits_btv - precise).max()) < 0.1


def test_dropout_is_off_without_a_key_and_reaches_the_output_with_one():
  model = models.tiny(0, dropout=0.5)
  tokens = jnp.arange(8)[None]
  plain = causal(model.module, tokens).logits_btv
  np.testing.assert_array_equal(plain, causal(model.module, tokens).logits_btv)
  drawn = [causal(model.module, tokens, jax.random.key(k)).logits_btv for k in (0, 1)]
  assert float(jnp.abs(drawn[0] - plain).max()) > 0.01
  assert float(jnp.abs(drawn[0] - drawn[1]).max()) > 0.01


def test_every_parameter_receives_gradient():
  for fields in models.FAMILIES.values():
    model = models.tiny(0, **fields)
    grads = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(
        m.causal(jnp.arange(12)[None]).logits_btv))))(model.module)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
      if 'key_bias' not in jax.tree_util.keystr(path):  # softmax ignores a shift of all keys
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


def test_sharded_forward_equals_one_device():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  built = models.config(tie_embeddings=False)
  init = lambda: decoder.init(built, jax.random.key(0))
  module = sharding.sharded_init(init, mesh)
  assert module.layers.attention.query_nhd[...].sharding.spec == PartitionSpec(
      None, 'tensor', None, 'fsdp')
  tokens = jax.random.randint(jax.random.key(1), (8, 6), 0, models.VOCAB)
  split = jax.device_put(tokens, sharding.batch_sharding(mesh))
  sharded = jax.jit(lambda m, t: m.causal(t).logits_btv)(module, split)
  np.testing.assert_allclose(sharded, jax.jit(init)().causal(tokens).logits_btv, atol=1e-5)


@pytest.mark.parametrize('sizes, message', [
    (dict(data=3), 'data=3, fsdp=1, tensor=1 does not fit 8 devices'),
    (dict(data=-1, fsdp=-1), 'only one axis may be -1, but data and fsdp are'),
    (dict(data=-1, tensor=0), 'does not fit 8 devices')])
def test_meshes_that_do_not_fit_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(**sizes)


@pytest.mark.parametrize('fields, message', [
    (dict(num_kv_heads=3), 'num_heads 4 is not a multiple of num_kv_heads 3'),
    (dict(head_dim=7), 'head_dim 7 must be even'),
    (dict(width=0), 'width is 0; it must be at least 1'),
    (dict(activation='swish'), "activation is 'swish'; it must be one of silu"),
    (dict(position='learned'), 'learned positions need max_positions'),
    (dict(dropout=1.0), r'dropout is 1.0; it must lie in \[0, 1\)')])
def test_impossible_configs_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    models.config(**fields)


def test_config_is_hashable_and_frozen():
  assert hash(models.config()) == hash(models.config())
  with pytest.raises(dataclasses.FrozenInstanceError):
    models.config().width = 3
