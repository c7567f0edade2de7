"""Chain drafting with feature-level drafts: exact, ragged, rebuilt from true features."""

import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drafts
import tables
from specdistill_jax import api
from specdistill_jax import structs
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import chain
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.drafters import feature

TARGET = drafts.target(num_layers=3)  # of which EAGLE-3 reads the inputs of two
NEW, WIDTH = 12, 8
# EAGLE-1 is FSPAD without its two parts, and decoded in trees.
KINDS = pytest.mark.parametrize('kind', ['fspad', 'eagle3'])


def prompts(count, seed=0):
  """Of 1 to 8 tokens: the shortest has no pair to draft from."""
  rng = np.random.default_rng(seed)
  return [[3]] + [rng.integers(2, 19, size=rng.integers(1, WIDTH + 1)).tolist()
                  for _ in range(count - 1)]


@functools.cache
def draft(kind):
  return drafts.tiny(kind, TARGET)


def speculate(kind, rows, key=jax.random.key(0), **settings):
  return api.speculate(TARGET, draft(kind), rows, key=key, prompt_width=WIDTH,
                       **dict(gamma=3, max_new_tokens=NEW) | settings)


@KINDS
def test_greedy_speculative_equals_greedy_autoregressive(kind):
  rows = prompts(24)
  expected = api.generate(TARGET, rows, max_new_tokens=NEW, temperature=0, prompt_width=WIDTH,
                          key=jax.random.key(0))
  for settings in (dict(), dict(min_confidence=0.3))[:1 + (kind == 'fspad')]:
    out = speculate(kind, rows, temperature=0, **settings)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_array_equal(out.lengths, expected.lengths)


@struct.dataclass
class PairCache:
  """The two tokens of each pair, so that a slip in position or rollback changes the law."""
  tokens_bs: jax.Array
  length_b: jax.Array

  def rollback(self, length_b):
    return self.replace(length_b=length_b)


@struct.dataclass
class Oracle:
  """A draft that knows its target, a table over two tokens, if it is fed the right pairs.

  The feature of a token is the token; so a pair is all that the target's next law depends on.
  A wrong feature, token, position or slot gives another law.
  """
  table: tables.TableModel

  def init_cache(self, batch, num_slots):
    return PairCache(jnp.full((batch, num_slots), -1), jnp.zeros((batch,), jnp.int32))

  def inputs(self, target_output):
    return target_output.features['final_btd'][..., :1]

  def read(self, tokens_bt, carried_btd, positions_bt, mask_bts, cache):
    first_bt = jnp.round(carried_btd[..., 0]).astype(jnp.int32)
    write = lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,))
    held_bs = jax.vmap(write)(cache.tokens_bs, tokens_bt, cache.length_b)
    # Each pair must stand in the slot of its position, behind a pair that ends in its feature.
    slots_bt = jnp.sum(mask_bts, axis=-1) - 1
    before_bt = jnp.take_along_axis(held_bs, jnp.maximum(slots_bt - 1, 0), axis=1)
    right_bt = (slots_bt == positions_bt) & ((slots_bt == 0) | (before_bt == first_bt))
    logits_btv = self.table.logits_vvv[first_bt, tokens_bt]
    read_btv = jnp.where(right_bt[..., None], logits_btv, -logits_btv)
    cache = PairCache(held_bs, cache.length_b + tokens_bt.shape[1])
    return read_btv, tokens_bt[..., None].astype(jnp.float32), cache

  def logits(self, read_btv):
    return read_btv


@struct.dataclass
class FeaturedTable(tables.TableModel):
  """A table whose feature of a token is the token."""

  def __call__(self, tokens_bt, positions_bt, mask_bts, cache):
    output = super().__call__(tokens_bt, positions_bt, mask_bts, cache)
    return output.replace(features={'final_btd': tokens_bt[..., None].astype(jnp.float32)})


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_a_draft_with_perfect_features_accepts_everything(temperature):
  """Whatever each row accepts, so that features, tokens and positions of all pairs are right."""
  table = FeaturedTable(tables.random_table(0, 11).logits_vvv)
  rng = np.random.default_rng(1)
  lengths_b = rng.integers(2, WIDTH + 1, 32).astype(np.int32)
  prompts_bt = np.where(np.arange(WIDTH) < lengths_b[:, None],
                        rng.integers(2, 11, (32, WIDTH)), 0).astype(np.int32)
  sampling = sampling_lib.Sampling(temperature)
  for accept in (1.0, 0.6):  # 0.6: the oracle lies at random, so that rows differ in pace
    oracle = Oracle(table) if accept == 1 else Liar(Oracle(table))
    drafter = feature.FeatureDrafter(oracle, gamma=3, sampling=sampling)
    state = engine.prefill_speculative(table, drafter, prompts_bt, lengths_b, jax.random.key(0),
                                       max_new_tokens=NEW)
    state = engine.decode_speculative(table, drafter, state, sampling=sampling, eos_id=-1,
                                      rule=rules.for_sampling('exact', 1.0, sampling))
    reached, accepted = np.sum(state.stats.reached_bg, 0), np.sum(state.stats.accepted_bg, 0)
    if accept == 1:
      np.testing.assert_array_equal(accepted, reached)
    else:
      # First tokens come from true features alone: they are never wrong.
      assert accepted[0] == reached[0] and accepted[1] < reached[1]
      assert len(set(np.asarray(state.stats.target_calls_b).tolist())) > 1


@struct.dataclass
class Liar:
  """An oracle whose drafted pairs, but not its verified ones, carry something wrong on."""
  oracle: Oracle

  def __getattr__(self, name):
    return getattr(self.oracle, name)

  def read(self, tokens_bt, carried_btd, positions_bt, mask_bts, cache):
    read_btv, carried_btd, cache = self.oracle.read(tokens_bt, carried_btd, positions_bt,
                                                    mask_bts, cache)
    return read_btv, jnp.where(tokens_bt[..., None] % 3 == 0, 2, carried_btd), cache


@KINDS
def test_after_any_verdict_drafting_goes_on_as_from_the_text_alone(kind):
  """The law of the next draft is that after reading the committed text as a prompt."""
  rows = prompts(8, seed=3)
  sampling = sampling_lib.Sampling(4.0)  # flat laws, of which some drafts are accepted
  module = api.decoding_module(TARGET, draft(kind))
  drafter = api.make_drafter(draft(kind), gamma=3, target_sampling=sampling, target=TARGET)
  prompts_bt, lengths_b = api.pad_prompts(TARGET, rows, NEW, WIDTH)
  rule = rules.for_sampling('exact', 1.0, sampling)
  step = jax.jit(functools.partial(chain.step, rule=rule, sampling=sampling, eos_id=-1))
  propose = jax.jit(type(drafter).propose)
  state = engine.prefill_speculative(module, drafter, prompts_bt, lengths_b, jax.random.key(0),
                                     max_new_tokens=NEW)
  for _ in range(3):
    state = step(module, drafter, state)
  assert len(set((state.lengths_b - lengths_b).tolist())) > 1, 'rows advance alike'
  fresh = engine.prefill_speculative(
      module, drafter, state.tokens_bs[:, :WIDTH + NEW], state.lengths_b, jax.random.key(0),
      max_new_tokens=NEW).replace(key_b=state.key_b)
  going, again = propose(drafter, state, state.key_b), propose(drafter, fresh, state.key_b)
  np.testing.assert_array_equal(going.tokens_bg, again.tokens_bg)
  np.testing.assert_allclose(going.log_probs_bgv, again.log_probs_bgv, atol=1e-4)
  assert np.all(going.drafter_state.cache.length_b == state.lengths_b - 1)


@pytest.mark.parametrize('kind', ['eagle3'])
def test_a_row_depends_neither_on_its_neighbours_nor_on_their_number(kind):
  rows, keys = prompts(5), jax.random.split(jax.random.key(5), 5)
  together = speculate(kind, rows, keys)
  order = np.array([4, 0, 3, 2, 1])
  shuffled = speculate(kind, [rows[i] for i in order], keys[order])
  np.testing.assert_array_equal(shuffled.tokens, together.tokens[order])
  np.testing.assert_array_equal(shuffled.stats.accepted_bg, together.stats.accepted_bg[order])
  for row in (0, 2):  # the first is a prompt of one token
    alone = speculate(kind, rows[row:row + 1], keys[row:row + 1])
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


@pytest.mark.parametrize('kind', ['fspad', 'eagle3'])
def test_the_law_on_given_text_is_that_of_drafting(kind):
  """Teacher forcing at place t gives what a drafter says that has read tokens 0 to t."""
  batch = drafts.rows()
  forced = api.on_given_text(TARGET, draft(kind))
  found = jax.jit(lambda forced, batch: forced.logits(forced.supervise(batch).features_btd))(
      forced, batch)
  drafter = api.make_drafter(draft(kind), gamma=1, target_sampling=sampling_lib.Sampling(1.0),
                             target=TARGET)
  module = api.decoding_module(TARGET, draft(kind))
  propose = jax.jit(type(drafter).propose)
  for read in (1, 2, 5):
    state = engine.prefill_speculative(
        module, drafter, batch.tokens_bt, np.full(3, read, np.int32), jax.random.key(0),
        max_new_tokens=2)
    log_probs = propose(drafter, state, state.key_b).log_probs_bgv[:, 0]
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(found[:, read - 1]), atol=2e-4)


def test_tokens_outside_of_the_draft_vocabulary_are_never_drafted():
  out = speculate('eagle3', prompts(16))
  sampling = sampling_lib.Sampling(1.0)
  drafter = api.make_drafter(draft('eagle3'), gamma=3, target_sampling=sampling, target=TARGET)
  state = engine.prefill_speculative(
      api.decoding_module(TARGET, draft('eagle3')), drafter,
      *api.pad_prompts(TARGET, prompts(16), NEW, WIDTH), jax.random.key(0), max_new_tokens=NEW)
  proposal = jax.jit(type(drafter).propose)(drafter, state, state.key_b)
  assert set(np.unique(proposal.tokens_bg)) <= set(drafts.DRAFT_IDS)
  emitted = {int(token) for row, n in zip(out.tokens, out.lengths) for token in row[:n]}
  assert emitted - set(drafts.DRAFT_IDS), 'the target emits others, too'


def test_a_draft_of_another_target_is_refused():
  other = drafts.target(width=8)
  with pytest.raises(ValueError, match="eagle: width is 16; it must be the target's, 8"):
    api.speculate(other, draft('eagle'), [[2, 3]], gamma=2, max_new_tokens=4,
                  key=jax.random.key(0))


def test_early_stopping_draws_what_full_drafts_draw():
  settings = dict(gamma=4, target_sampling=sampling_lib.Sampling(1.0), target=TARGET)
  drafter = api.make_drafter(draft('fspad'), **settings)
  state = engine.prefill_speculative(
      api.decoding_module(TARGET, draft('fspad')), drafter,
      *api.pad_prompts(TARGET, prompts(8), NEW, WIDTH), jax.random.key(0), max_new_tokens=NEW)
  propose = jax.jit(type(drafter).propose)
  full = propose(drafter, state, state.key_b)
  early = propose(dataclasses.replace(drafter, min_confidence=0.5), state, state.key_b)
  drafted_b = np.asarray(early.num_drafted_b)
  assert 1 <= drafted_b.min() < drafted_b.max() <= 4
  for row, count in enumerate(drafted_b):
    np.testing.assert_array_equal(early.tokens_bg[row, :count], full.tokens_bg[row, :count])
    best = np.exp(np.max(full.log_probs_bgv[row, :count], axis=-1))
    assert np.all(best[:-1] >= 0.5) and (count == 4 or best[-1] < 0.5)
