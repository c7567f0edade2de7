"""T5: causal, the same incrementally as in full, blind to padding, and exact when speculating."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
import models
from specdistill_jax import api
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib
from specdistill_jax.evaluation import acceptance
from specdistill_jax.losses import objectives
from specdistill_jax.models import families
from specdistill_jax.models import t5_layers
from specdistill_jax.training import rollouts
from specdistill_jax.training import state as train_state
from specdistill_jax.training import step
import tables

VERSIONS = {'v1.1': dict(), 'v1.0': dict(gated_mlp=False, tie_embeddings=True)}
TARGET = models.tiny_t5(0, scale=1.8)
DRAFT = models.perturbed(TARGET, 0.1)
OTHER_DRAFT = models.tiny_t5(5, width=8, num_encoder_layers=1, num_decoder_layers=1, num_heads=1)
NEW = 12
LENGTHS = np.array([3, 8, 1, 5], np.int32)
PROMPTS = np.where(np.arange(8) < LENGTHS[:, None],
                   np.random.default_rng(0).integers(2, models.VOCAB, (4, 8)),
                   structs.PAD_ID).astype(np.int32)


def ragged_prompts(count, seed=0, longest=16):
  rng = np.random.default_rng(seed)
  return [rng.integers(2, models.VOCAB, size=rng.integers(1, longest + 1)).tolist()
          for _ in range(count)]


@jax.jit
def full(module, prompts_bt, lengths_b, tokens_bt):
  """Logits of the whole decoder at once, layers scanned and no cache."""
  return module.logits(module.decode(tokens_bt, *module.encode(prompts_bt, lengths_b)))


# The model itself.


@pytest.mark.parametrize('version', VERSIONS)
def test_incremental_equals_full_forward_over_ragged_rows(version):
  """Blocks of several sizes, with wrong tokens fed and rolled back, row by row."""
  module = models.tiny_t5(3, **VERSIONS[version]).module
  tokens_bt = jax.random.randint(jax.random.key(1), (4, 12), 0, models.VOCAB)
  tokens_bt = tokens_bt.at[:, 0].set(structs.PAD_ID)
  expected = full(module, PROMPTS, LENGTHS, tokens_bt)
  unrolled, slots = module.unstacked(), 20
  feed = jax.jit(lambda module, tokens, cache: module(
      tokens, *state_lib.block_positions(cache.length_b, tokens.shape[1], slots), cache))
  start = jax.jit(lambda module: module.start(PROMPTS, LENGTHS))(unrolled)
  cache = unrolled.init_cache(4, slots, start.memory)
  rng = np.random.default_rng(0)
  while int(cache.length_b.min()) < 12:
    before_b, block = np.asarray(cache.length_b), int(rng.choice([1, 4]))
    good_b = rng.integers(0, block + 1, size=4)  # tokens of the block that are kept
    index_bt = before_b[:, None] + np.arange(block)
    right_bt = np.take_along_axis(np.asarray(tokens_bt), np.minimum(index_bt, 11), axis=1)
    keep_bt = (np.arange(block) < good_b[:, None]) & (index_bt < 12)
    fed_bt = np.where(keep_bt, right_bt, rng.integers(0, models.VOCAB, size=(4, block)))
    output = feed(unrolled, jnp.asarray(fed_bt), cache)
    for row, t in zip(*np.nonzero(keep_bt)):
      np.testing.assert_allclose(output.logits_btv[row, t], expected[row, before_b[row] + t],
                                 atol=3e-5)
    cache = output.cache.rollback(jnp.asarray(before_b + keep_bt.sum(axis=1)))


def test_decoder_is_causal_and_encoder_is_not():
  """By gradient: which tokens' embeddings do the features at one position depend on?"""
  module = models.tiny_t5(0).module
  prompt, completion = jnp.arange(12, 18)[None], jnp.arange(2, 12)[None]

  def feature_sum(embedding_vd, at):
    changed = jax.tree.map(lambda x: x, module)
    changed.embedding_vd[...] = embedding_vd
    encoded = changed.encode(prompt, jnp.array([6]))
    return jnp.sum(changed.decode(completion, *encoded)[:, at] ** 2)

  grad = jax.jit(jax.grad(feature_sum), static_argnums=1)
  touched = np.abs(grad(module.embedding_vd[...], 6)).sum(axis=1) > 0
  assert touched[2:9].all() and not touched[9:12].any()  # fed at 0..6, and after
  assert touched[12:18].all()


def reference_bucket(relative_position, bidirectional, num_buckets, max_distance):
  """The published rule for one distance, as mesh-tensorflow and transformers write it."""
  bucket, n = 0, -relative_position
  if bidirectional:
    num_buckets //= 2
    bucket += num_buckets if n < 0 else 0
    n = abs(n)
  else:
    n = max(n, 0)
  max_exact = num_buckets // 2
  if n < max_exact:
    return bucket + n
  large = max_exact + int(np.float32(np.log(np.float32(n) / np.float32(max_exact)))
                          / np.float32(math.log(max_distance / max_exact))
                          * np.float32(num_buckets - max_exact))
  return bucket + min(large, num_buckets - 1)


@pytest.mark.parametrize('bidirectional', [True, False])
@pytest.mark.parametrize('buckets, longest', [(32, 128), (8, 12), (16, 50)])
def test_relative_buckets_are_the_published_ones(bidirectional, buckets, longest):
  distance = np.arange(-300, 301)
  table_rn = jnp.arange(buckets, dtype=jnp.float32)[:, None]
  bias = t5_layers.relative_bias(table_rn, jnp.asarray(distance)[None, None],
                                 bidirectional=bidirectional, max_distance=longest)
  expected = [reference_bucket(int(d), bidirectional, buckets, longest) for d in distance]
  np.testing.assert_array_equal(np.asarray(bias)[0, 0, 0], expected)
  # The causal stack never meets a slot ahead: those share the bucket of distance 0.
  assert set(expected) == set(range(buckets)) - ({buckets // 2} if bidirectional else set())


@pytest.mark.parametrize('version', VERSIONS)
def test_padding_of_prompts_never_leaks(version):
  module = models.tiny_t5(1, **VERSIONS[version]).module
  tokens_bt = jnp.asarray(np.arange(20).reshape(4, 5) % models.VOCAB)
  expected = full(module, PROMPTS, LENGTHS, tokens_bt)
  other = np.where(np.arange(8) < LENGTHS[:, None], PROMPTS, 7)
  np.testing.assert_array_equal(full(module, other, LENGTHS, tokens_bt), expected)
  wider = np.pad(other, ((0, 0), (0, 5)), constant_values=3)
  np.testing.assert_allclose(full(module, wider, LENGTHS, tokens_bt), expected, atol=1e-5)
  real = other.copy()
  real[0, 2] = 7  # the last real token of row 0: it must be seen
  assert np.abs(full(module, real, LENGTHS, tokens_bt) - expected)[0].max() > 1e-3


def test_prompts_are_read_once():
  """Decoding needs neither the encoder nor the projections that read what it put out."""
  module = TARGET.module.unstacked()
  state = lambda: engine.prefill_autoregressive(module, PROMPTS, LENGTHS, jax.random.key(0),
                                                max_new_tokens=NEW)
  decode = functools.partial(engine.decode_autoregressive, sampling=sampling_lib.Sampling(1.0))
  def poison(path, leaf):
    name = jax.tree_util.keystr(path)
    read = 'encoder' in name or ('cross' in name and ('key_khd' in name or 'value_khd' in name))
    return jnp.full_like(leaf, jnp.nan) if read else leaf
  poisoned = jax.tree_util.tree_map_with_path(poison, module)
  assert np.isnan(poisoned.encode(PROMPTS, LENGTHS)[0]).all()
  expected = decode(module, state())
  np.testing.assert_array_equal(decode(poisoned, state()).tokens_bs, expected.tokens_bs)
  assert expected.lengths_b.sum() > 8


def test_stacked_equals_unstacked_and_caches_need_the_latter():
  once = TARGET.module.unstacked()
  tokens_bt = jnp.asarray(np.arange(20).reshape(4, 5) % models.VOCAB)
  np.testing.assert_allclose(full(once, PROMPTS, LENGTHS, tokens_bt),
                             full(TARGET.module, PROMPTS, LENGTHS, tokens_bt), atol=1e-5)
  assert once.unstacked() is once
  with pytest.raises(ValueError, match='call T5.unstacked'):
    TARGET.module.start(PROMPTS, LENGTHS)


def test_dropout_and_dtypes():
  model = models.tiny_t5(0, dropout=0.5, dtype='bfloat16')
  run = jax.jit(lambda key: model.module.logits(
      model.module.supervise(batch(), dropout_key=key).features_btd))
  plain = run(None)
  assert plain.dtype == jnp.float32
  np.testing.assert_array_equal(plain, run(None))
  assert float(jnp.abs(run(jax.random.key(0)) - plain).max()) > 0.01
  assert float(jnp.abs(run(jax.random.key(0)) - run(jax.random.key(1))).max()) > 0.01
  assert {leaf.dtype for leaf in jax.tree.leaves(model.module)} == {jnp.dtype('float32')}


@pytest.mark.parametrize('version', VERSIONS)
def test_every_parameter_receives_gradient(version):
  module = models.tiny_t5(0, **VERSIONS[version]).module
  grads = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(full(
      m, jnp.arange(19)[None], jnp.array([19]), jnp.arange(19)[None])))))(module)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path)
    used = leaf[:4] if 'bias_rn' in name else leaf  # bucket 4 of the encoder's 8 stays empty
    assert np.all(np.abs(used).reshape(used.shape[0], -1).max(axis=1) > 0), name


def test_tied_head_is_the_embedding_over_the_root_of_the_width():
  module = models.tiny_t5(0, **VERSIONS['v1.0']).module
  features = jax.random.normal(jax.random.key(0), (2, 3, 16))
  np.testing.assert_allclose(module.logits(features),
                             features @ module.embedding_vd[...].T / 4, atol=1e-5)
  assert module.head_vd is None and module.decoder_layers.mlp.gate_fd is None


@pytest.mark.parametrize('fields, message', [
    (dict(width=0), 't5: width is 0; it must be at least 1'),
    (dict(relative_buckets=6), 'relative_buckets is 6; it must be a multiple of 4'),
    (dict(relative_max_distance=4), 'relative_max_distance is 4; it must exceed'),
    (dict(dtype='float16'), "dtype is 'float16'"),
    (dict(dropout=1.0), 'dropout is 1.0')])
def test_impossible_configs_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    models.t5_config(**fields)


# Decoding.


def test_greedy_autoregressive_equals_full_forward_passes():
  prompts = ragged_prompts(4)
  out = api.generate(TARGET, prompts, max_new_tokens=NEW, temperature=0, key=jax.random.key(0))
  prompts_bt, lengths_b = api.pad_prompts(TARGET, prompts, NEW)
  fed_bt = np.zeros((4, NEW), np.int32)
  for t in range(NEW):
    best_b = np.argmax(full(TARGET.module, prompts_bt, lengths_b, fed_bt)[:, t], axis=-1)
    live_b = t < out.lengths
    np.testing.assert_array_equal(out.tokens[live_b, t], best_b[live_b])
    fed_bt[:, min(t + 1, NEW - 1)] = best_b


@pytest.mark.parametrize('draft, gamma, batch_size', [
    (DRAFT, 1, 64), (DRAFT, 4, 64), (DRAFT, 3, 1), (OTHER_DRAFT, 3, 64)])
def test_greedy_speculative_equals_greedy_autoregressive(draft, gamma, batch_size):
  """Each model has its own encoder; widths and depths need not agree."""
  prompts = ragged_prompts(64)
  common_settings = dict(max_new_tokens=NEW, temperature=0, prompt_width=16)
  expected = api.generate(TARGET, prompts, key=jax.random.key(0), **common_settings)
  calls = 0
  for begin in range(0, min(64, 6 * batch_size), batch_size):
    rows = slice(begin, begin + batch_size)
    out = api.speculate(TARGET, draft, prompts[rows], gamma=gamma, key=jax.random.key(1),
                        **common_settings)
    np.testing.assert_array_equal(out.tokens, expected.tokens[rows])
    np.testing.assert_array_equal(out.lengths, expected.lengths[rows])
    calls += int(out.stats.target_calls_b.sum()) - int(out.lengths.sum())
  assert draft is OTHER_DRAFT or calls < 0, 'speculation never saved a call'


def test_a_draft_equal_to_the_target_accepts_everything():
  out = api.speculate(TARGET, TARGET, ragged_prompts(64), gamma=4, max_new_tokens=NEW,
                      key=jax.random.key(0))
  assert out.stats.reached_bg.sum() > 200
  assert out.stats.accepted_bg.sum() >= out.stats.reached_bg.sum() - 1  # a draw between roundings


def test_a_row_depends_neither_on_its_neighbours_nor_on_the_width_of_its_buffer():
  prompts, keys = ragged_prompts(6), jax.random.split(jax.random.key(5), 6)
  settings = dict(gamma=3, max_new_tokens=NEW)
  together = api.speculate(TARGET, DRAFT, prompts, key=keys, prompt_width=16, **settings)
  order = np.array([4, 0, 5, 2, 1, 3])
  shuffled = api.speculate(TARGET, DRAFT, [prompts[i] for i in order], key=keys[order],
                           prompt_width=16, **settings)
  np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
  np.testing.assert_array_equal(shuffled.stats.accepted_bg, together.stats.accepted_bg[order])
  alone = api.speculate(TARGET, DRAFT, prompts[3:4], key=keys[3:4], prompt_width=32, **settings)
  np.testing.assert_array_equal(alone.tokens[0], together.tokens[3])


DEPTH, SAMPLES = 3, 60_000


def enumerated_law(model, prompt):
  """Probability of each sequence of `DEPTH` tokens, by whole forward passes."""
  law, ready = {(): 1.0}, {}
  prompt_bt = np.array([[*prompt, *[structs.PAD_ID] * (6 - len(prompt))]])
  for depth in range(DEPTH):
    extended = {}
    for prefix, probability in law.items():
      fed = np.zeros((1, DEPTH), np.int32)
      fed[0, 1:depth + 1] = prefix
      logits_btv = full(model.module, prompt_bt, np.array([len(prompt)]), fed)
      logits_v = np.asarray(logits_btv, np.float64)[0, depth]
      for token, p in enumerate(tables.warped(logits_v, 1.0, None, None)):
        done = token == structs.EOS_ID
        (ready if done else extended)[(*prefix, token)] = probability * p
    law = extended
  return law | ready


@functools.cache
def small_pair():
  small = dict(vocab_size=5, width=8, num_heads=1, num_encoder_layers=1, num_decoder_layers=1)
  target = models.tiny_t5(3, scale=1.6, **small)
  return target, models.perturbed(target, 0.35)


def test_speculative_samples_follow_the_targets_law():
  """Two prompts of different lengths, one padded, share the batch; each has its own law."""
  target, draft = small_pair()
  prompts = [[2, 4, 3], [3, 2, 2, 4, 2, 3]]
  out = api.speculate(target, draft, prompts * (SAMPLES // 2), gamma=3, prompt_width=8,
                      max_new_tokens=DEPTH + 1, key=jax.random.key(3))
  kept = out.stats.accepted_bg.sum() / out.stats.reached_bg.sum()
  assert 0.1 < kept < 0.97, 'the draft agrees too well, or never: the test saw one branch'
  for row, prompt in enumerate(prompts):
    law = enumerated_law(target, prompt)
    assert sum(law.values()) == pytest.approx(1) and len(law) == 4 ** 3 + 4 ** 2 + 4 + 1
    p_value = functools.partial(tables.chi_square_p_value, samples=np.asarray(out.tokens[row::2]),
                                lengths=np.asarray(out.lengths[row::2]), depth=DEPTH)
    assert p_value(law) > 1e-3 / 2
    # The other prompt, or the draft's own law: the test tells them apart.
    assert p_value(enumerated_law(target, prompts[1 - row])) < 1e-9
    assert p_value(enumerated_law(draft, prompt)) < 1e-9


@pytest.mark.parametrize('order', [1, -1])
def test_a_draft_of_another_family_is_refused(order):
  target, draft = (TARGET, models.tiny(0))[::order]
  with pytest.raises(ValueError, match="family '(t5|decoder)' and the draft of '(t5|decoder)'"):
    api.speculate(target, draft, [[2]], gamma=1, max_new_tokens=2, key=jax.random.key(0))


# Training.

WIDTH = 10
ROLLOUT = rollouts.Rollout(sampling_lib.Sampling(), max_new_tokens=5, prompt_width=4,
                           shortest_prompt=2)
FORWARD_KL = objectives.Objective('forward_kl')


def batch(rows=8, **fields):
  rng = np.random.default_rng(0)
  prompts = rng.integers(2, 5, rows).astype(np.int32)
  lengths = (prompts + rng.integers(2, 7, rows)).astype(np.int32)
  prompts[0], lengths[0] = 4, WIDTH  # a row without padding: nothing of it may be read twice
  position = np.arange(WIDTH)[None]
  tokens = rng.integers(2, models.VOCAB, (rows, WIDTH))
  return structs.Batch(
      tokens_bt=np.where(position < lengths[:, None], tokens, structs.PAD_ID).astype(np.int32),
      loss_mask_bt=((position >= prompts[:, None])
                    & (position < lengths[:, None])).astype(np.float32),
      prompt_lengths_b=prompts, lengths_b=lengths, **fields)


def test_supervision_is_a_loop_over_the_completion():
  rows = batch()
  learnt = jax.jit(lambda module: module.supervise(rows))(TARGET.module)
  logits_btv = np.asarray(TARGET.module.logits(learnt.features_btd))
  assert learnt.mask_bt.sum() == rows.loss_mask_bt.sum()
  for row in range(8):
    begin, end = rows.prompt_lengths_b[row], rows.lengths_b[row]
    completion = rows.tokens_bt[row, begin:end]
    np.testing.assert_array_equal(np.asarray(learnt.labels_bt)[row][learnt.mask_bt[row] > 0],
                                  completion)
    fed = np.zeros((1, WIDTH), np.int32)
    fed[0, 1:len(completion)] = completion[:-1]
    prompt = np.zeros((1, 4), np.int32)
    prompt[0, :begin] = rows.tokens_bt[row, :begin]
    alone = full(TARGET.module, prompt, np.array([begin]), fed)
    np.testing.assert_allclose(logits_btv[row, :len(completion)], alone[0, :len(completion)],
                               atol=1e-5)


def test_narrower_buffers_change_no_loss():
  losses = jax.jit(functools.partial(step.losses, FORWARD_KL), static_argnames='first')
  whole = losses(DRAFT.module, TARGET.module, batch())
  narrow = losses(DRAFT.module, TARGET.module, batch(widths=structs.Widths(4, 6)), first=1)
  for found, expected in zip(jax.tree.leaves(narrow), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  shape = jax.eval_shape(lambda module: module.supervise(
      batch(widths=structs.Widths(4, 6))), TARGET.module).features_btd.shape
  assert shape[1] == 6  # not the row's 10: the head is paid for completions only


def test_prompts_carry_no_loss_in_language_modelling():
  """There all but the first token are to be learnt; the encoder's share of them is not."""
  rows = batch()
  everything = rows.replace(loss_mask_bt=(
      (np.arange(WIDTH) > 0) & (np.arange(WIDTH) < rows.lengths_b[:, None])).astype(np.float32))
  losses = jax.jit(functools.partial(step.losses, objectives.Objective()))
  counts = [losses(TARGET.module, None, r).num_tokens for r in (rows, everything)]
  assert counts[0] == counts[1] == rows.loss_mask_bt.sum()


def test_alpha_of_a_model_with_itself_is_one_and_of_a_pair_is_less():
  rows = batch()
  inputs = rows.tokens_bt, rows.prompt_lengths_b, rows.lengths_b
  count = functools.partial(acceptance.alpha_counts, sampling=sampling_lib.Sampling(1.0))
  same = np.asarray(count(TARGET.module, TARGET.module, *inputs))
  np.testing.assert_allclose(same[:, 0], rows.lengths_b - rows.prompt_lengths_b, rtol=1e-5)
  pair = np.asarray(count(TARGET.module, DRAFT.module, *inputs))
  np.testing.assert_array_equal(pair[:, 1], same[:, 1])
  assert np.all(pair[:, 0] < same[:, 0])
  narrow = count(TARGET.module, DRAFT.module, *inputs, widths=structs.Widths(4, 6))
  np.testing.assert_allclose(narrow, pair, rtol=1e-5)


def test_rollouts_are_the_students_own_samples_behind_their_prompts():
  rollout = dataclasses.replace(ROLLOUT, sampling=sampling_lib.Sampling(0.0))
  rows = batch()
  sampled = jax.device_get(jax.jit(rollouts.generate, static_argnames='rollout')(
      TARGET.module, rows, jax.random.key(0), rollout=rollout))
  prompts = [row[:n].tolist() for row, n in zip(rows.tokens_bt, rows.prompt_lengths_b)]
  expected = api.generate(TARGET, prompts, max_new_tokens=5, temperature=0,
                          key=jax.random.key(0))
  assert sampled.tokens_bt.shape == (8, 9) and sampled.widths == structs.Widths(4, 5)
  for row, prompt in enumerate(prompts):
    whole = prompt + expected.tokens[row, :expected.lengths[row]].tolist()
    assert sampled.tokens_bt[row].tolist() == whole + [structs.PAD_ID] * (9 - len(whole))
    assert np.flatnonzero(sampled.loss_mask_bt[row]).tolist() == list(
        range(len(prompt), len(whole)))
    assert sampled.lengths_b[row] == len(whole)


def train(mesh, num_steps=3):
  """On-policy distillation for a few steps; the loss, alpha and gradient norm of each."""
  config = models.t5_config(num_encoder_layers=1, num_decoder_layers=1)
  section = common.train()
  section.update(dict(steps=10, batch_size=8, warmup_steps=0, learning_rate=1e-2))
  create = functools.partial(train_state.create,
                             transformation=train_state.optimizer(section))
  abstract = jax.eval_shape(lambda: create(families.init(config, jax.random.key(0))))
  layout = sharding.parameter_shardings(abstract, mesh)
  state = jax.jit(create, out_shardings=layout)(jax.device_get(student()))
  update = step.make(section, FORWARD_KL, ROLLOUT, mesh, abstract)
  teacher = jax.device_put(TARGET.module, sharding.parameter_shardings(TARGET.module, mesh))
  rows = jax.device_put(batch(), sharding.batch_sharding(mesh))
  figures = []
  for _ in range(num_steps):
    state, metrics = update(state, teacher, rows, jax.random.key(0))
    assert metrics.on_policy == 1
    figures.append([float(x) for x in (metrics.loss, metrics.alpha, metrics.grad_norm)])
  return np.array(figures), state


@functools.cache
def student():
  return models.tiny_t5(7, num_encoder_layers=1, num_decoder_layers=1).module


def test_eight_devices_train_as_one():
  alone, _ = train(sharding.make_mesh(devices=jax.devices()[:1]))
  spread, state = train(sharding.make_mesh(data=2, fsdp=2, tensor=2))
  np.testing.assert_allclose(spread, alone, rtol=1e-4)
  assert alone[-1, 0] < alone[0, 0]
  layer = state.params.decoder_layers
  assert layer.cross.key_khd[...].sharding.spec == jax.sharding.PartitionSpec(
      None, 'tensor', None, 'fsdp')
  assert state.params.decoder_bias_rn[...].sharding.spec == jax.sharding.PartitionSpec(
      None, 'tensor')
