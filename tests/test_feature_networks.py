"""The networks of feature-level drafts: their equations, sizes, and what they don't hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drafts
from specdistill_jax.checkpoints import key_tables
from specdistill_jax.drafters import eagle3
from specdistill_jax.drafters import families
from specdistill_jax.drafters import feature
from specdistill_jax.models import variants

TARGET = drafts.target()
BATCH = drafts.rows()
KINDS = pytest.mark.parametrize('kind', drafts.KINDS)


@functools.cache
def teacher_output():
  """Of the rows, with three layers' inputs; float64."""
  captured = eagle3.captured_layers(drafts.LAYERS)
  output = jax.jit(lambda module: module.capturing(captured).causal(BATCH.tokens_bt))(
      TARGET.module)
  return jax.tree.map(lambda x: np.asarray(x, np.float64), output)


def embedding():
  return np.asarray(TARGET.module.embedding_vd[...], np.float64)


def carried_row(p, row):
  """What is carried at verified positions of a row."""
  features = teacher_output().features
  if 'fusion_dw' in p and 'head_vd' in p:
    return features['captured_btw'][row] @ p['fusion_dw'].T
  return features['final_btd'][row]


@KINDS
def test_forward_agrees_with_the_equations_in_float64(kind):
  """Over whole rows at once, and pair by pair through the cache, drafted pairs included."""
  model = drafts.tiny(kind, TARGET)
  p, config = drafts.numbers(model.module), model.config
  bound = feature.Bound(model.module, TARGET.module.without_layers())
  tokens_bt = BATCH.tokens_bt[:, 1:]
  b, t = tokens_bt.shape
  verified = 5  # pairs with true features; the rest carry the draft's own output
  cache = bound.init_cache(b, t)
  read = jax.jit(feature.Bound.read)

  def step(bound, *inputs):
    read_btd, carried_btd, cache = read(bound, *inputs)
    return bound.logits(read_btd), carried_btd, cache

  carried_btd = bound.inputs(jax.tree.map(jnp.float32, teacher_output()))[:, :verified]
  positions_bt = np.broadcast_to(np.arange(t), (b, t))
  mask_bts = positions_bt[:, :, None] >= np.arange(t)
  logits_btv, out_btd, cache = step(bound, tokens_bt[:, :verified], carried_btd,
                                    positions_bt[:, :verified], mask_bts[:, :verified], cache)
  found, carried_b1d = [logits_btv], out_btd[:, -1:]
  for at in range(verified, t):
    now = slice(at, at + 1)
    logits_btv, carried_b1d, cache = step(bound, tokens_bt[:, now], carried_b1d,
                                          positions_bt[:, now], mask_bts[:, now], cache)
    found.append(logits_btv)
  found = np.concatenate(found, axis=1)

  for row in range(b):
    one, embedded = drafts.step(config), embedding()[tokens_bt[row]]
    read, carried, slots = one(p, config, embedded[:verified], carried_row(p, row)[:verified],
                               np.arange(verified))
    reads, carried = [read], carried[-1:]
    for at in range(verified, t):
      read, carried, slots = one(p, config, embedded[at:at + 1], carried, [at], slots)
      reads.append(read)
    reads = np.concatenate(reads)
    if config.family == 'eagle3':
      logits = np.full((t, 19), -np.inf)
      logits[:, list(drafts.DRAFT_IDS)] = reads @ p['head_vd'].T
    else:
      logits = reads @ np.asarray(TARGET.module.head_vd[...], np.float64).T
    finite = logits[np.isfinite(logits)]
    np.testing.assert_allclose(found[row], logits, rtol=1e-5, atol=1e-5 * np.abs(finite).max())
    assert np.ptp(finite) > 0.5, 'flat logits would agree with anything'


@KINDS
def test_a_draft_holds_neither_embedding_nor_head_of_its_target(kind):
  model = drafts.tiny(kind, TARGET)
  shapes = {name: leaf.shape for name, leaf in key_tables.by_path(model.module).items()}
  own_head = shapes.pop('head_vd', None)
  assert own_head == ((len(drafts.DRAFT_IDS), 16) if kind == 'eagle3' else None)
  assert not any(TARGET.config.vocab_size in shape for shape in shapes.values()), shapes
  assert not any('embedding' in name for name in shapes if name != 'embedding_norm/scale_d')
  bound = feature.Bound(model.module, TARGET.module.without_layers())
  shared = [leaf for leaf in jax.tree.leaves(bound) if 19 in leaf.shape]
  assert all(any(leaf is held for held in jax.tree.leaves(TARGET.module)) for leaf in shared)


def count(target, **fields):
  config = families.config(fields, variants.config(target))
  abstract = jax.eval_shape(lambda: families.init(config, jax.random.key(0)))
  return sum(leaf.size for leaf in jax.tree.leaves(abstract)) / 1e6


@pytest.mark.parametrize('target, fields, millions', [
    ('vicuna-7b', dict(family='eagle'), 236),
    ('vicuna-33b', dict(family='eagle', num_kv_heads=13), 557),
    ('vicuna-33b', dict(family='eagle'), 624),
    ('llama-3-8b', dict(family='eagle', fusion_bias=False), 252),
    ('llama-3-70b', dict(family='eagle', fusion_bias=False), 990),
    ('vicuna-7b', dict(family='fspad'), 416),
    ('vicuna-33b', dict(family='fspad'), 1101),
    ('llama-3-8b', dict(family='fspad', num_kv_heads=32, mlp_width=11_008), 416),
    ('llama-3-70b', dict(family='fspad'), 1929),
    ('vicuna-7b', dict(family='fspad', partial_alignment=False), 236 + 135.3),
    ('vicuna-7b', dict(family='fspad', feature_sampling=False), 236 + 45.1),
    ('llama-3.1-8b', dict(family='eagle3'), 425)])
def test_sizes_are_those_of_the_papers(target, fields, millions):
  assert abs(count(target, **fields) - millions) < 0.6


def test_without_both_parts_fspad_is_eagle():
  eagle = drafts.tiny('eagle', TARGET).module
  plain = drafts.tiny('fspad', TARGET, feature_sampling=False, partial_alignment=False).module
  assert {name: leaf.shape for name, leaf in key_tables.by_path(eagle).items()} == {
      name: leaf.shape for name, leaf in key_tables.by_path(plain).items()}


@pytest.mark.parametrize('unstacked', [False, True])
def test_captured_features_are_the_inputs_of_layers(unstacked):
  """Recomputed by running the layers below them; scanned and unrolled alike."""
  module = TARGET.module.capturing((0, 3, 5))
  module = module.unstacked() if unstacked else module
  output = jax.jit(lambda m: m.causal(BATCH.tokens_bt))(module)
  assert output.features['captured_btw'].shape == (*BATCH.tokens_bt.shape, 3 * 16)
  plain = TARGET.module.unstacked()
  b, t = BATCH.tokens_bt.shape
  positions_bt = jnp.broadcast_to(jnp.arange(t), (b, t))

  @jax.jit
  def inputs_of_layers(plain):
    x_btd, inputs = plain.embed(BATCH.tokens_bt, positions_bt), []
    for index, block in enumerate(plain.layers):
      inputs.append(x_btd)
      mask, frequencies = plain._layer_inputs(index, positions_bt,
                                              positions_bt[:, :, None] >= jnp.arange(t))
      x_btd, _ = block(x_btd, positions_bt, mask, frequencies=frequencies)
    return jnp.concatenate([inputs[i] for i in (0, 3, 5)], axis=-1)

  np.testing.assert_allclose(output.features['captured_btw'], inputs_of_layers(plain),
                             rtol=1e-4, atol=2e-3)
  assert 'captured_btw' not in TARGET.module.causal(BATCH.tokens_bt).features
  with pytest.raises(ValueError, match=r'layers \(6,\) can.t be captured.*layers 0 to 5'):
    TARGET.module.capturing((6,))


@pytest.mark.parametrize('layers, captured', [
    (32, (2, 16, 29)), (80, (2, 40, 77)), (6, (2, 3, 3)), (4, (1, 2, 3)), (2, (1, 1, 1)),
    (1, (0, 0, 0))])
def test_layers_that_eagle3_fuses(layers, captured):
  assert eagle3.captured_layers(layers) == captured


def test_the_draft_vocabulary_is_kept_in_a_word():
  assert eagle3.most_frequent(np.array([0, 5, 0, 7, 0, 7]), 4).tolist() == [0, 1, 3, 5]
  assert eagle3.most_frequent(np.array([2, 5, 0, 7, 1, 7]), 4).tolist() == [0, 1, 3, 5]
  assert eagle3.vocabulary_ids(eagle3.vocabulary_bits([3, 0, 9], 12)).tolist() == [0, 3, 9]


@pytest.mark.parametrize('fields, message', [
    (dict(family='eagle', width=8), "eagle: width is 8; it must be the target's, 16"),
    (dict(family='eagle', dropout=0.1), 'eagle: dropout is 0.1; it must be 0'),
    (dict(family='eagle3', draft_vocab_size=20), 'draft_vocab_size is 20; it must be at least 1'),
    (dict(family='eagle3', captured_layers=(1,)), r'captured_layers are \(1,\); there must be 3'),
    (dict(family='eagle3', unrolled_steps=0), 'unrolled_steps is 0; it must be at least 1'),
    (dict(family='eagle3', draft_vocab_size=2, draft_vocabulary='ff'),
     'draft_vocabulary has 8 tokens up to 7; there must be 2'),
    (dict(family='fspad', num_kv_heads=3), 'num_heads 4 is not a multiple of num_kv_heads 3')])
def test_impossible_drafts_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    families.config(fields, TARGET.config)


def test_a_target_without_rotary_positions_is_refused():
  with pytest.raises(ValueError, match="family 'fspad', which needs a target that is a decoder"):
    families.config(dict(family='fspad'), drafts.models.config(**drafts.models.FAMILIES['gpt']))
  with pytest.raises(ValueError, match='and the target is a t5'):
    families.config(dict(family='eagle'), drafts.models.t5_config())
