"""Trees in the decoding loop: greedy equality, rows, counts, caches, chains."""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import tables
import trees
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import tree as tree_lib
from specdistill_jax.drafters import lm
from specdistill_jax.drafters import tree as drafter_lib
from specdistill_jax.models import decoder as decoder_lib

GREEDY, PLAIN = sampling_lib.Sampling(0.0), sampling_lib.Sampling(1.0)
NEW = 20
VOCAB = 7
SHAPES = {'eagle1': tree_lib.EAGLE1, 'dynamic': tree_lib.Dynamic(3, 3, 8)}
ALL_SHAPES = SHAPES | {'bushy': trees.BUSHY}


def prompts(count, vocab, longest=8, seed=0):
  rng = np.random.default_rng(seed)
  lengths_b = rng.integers(1, longest + 1, size=count)
  prompts_bt = rng.integers(2, vocab, size=(count, longest))
  return np.where(np.arange(longest) < lengths_b[:, None], prompts_bt, 0), lengths_b


def alone(target, prompts_bt, lengths_b):
  state = engine.prefill_autoregressive(target, prompts_bt, lengths_b, jax.random.key(0),
                                        max_new_tokens=NEW)
  return finish(engine.decode_autoregressive(target, state, sampling=GREEDY))


def speculate(target, drafter, prompts_bt, lengths_b, *, rule=rules.Greedy(), sampling=GREEDY,
              key=jax.random.key(1)):
  state = engine.prefill_speculative(target, drafter, prompts_bt, lengths_b, key,
                                     max_new_tokens=NEW)
  return finish(engine.decode_speculative(target, drafter, state, rule=rule, sampling=sampling))


def finish(state):
  return jax.device_get(engine.generation(state, max_new_tokens=NEW))


def assert_same(found, expected, rows=slice(None)):
  np.testing.assert_array_equal(found.tokens, expected.tokens[rows])
  np.testing.assert_array_equal(found.lengths, expected.lengths[rows])


TABLE = tables.random_table(0, VOCAB)
NEAR = trees.TableDraft(TABLE.logits_vvv + 0.7 * tables.random_table(5, VOCAB).logits_vvv)


@pytest.mark.parametrize('shape', SHAPES)
def test_greedy_decoding_along_trees_is_the_targets_own(shape):
  """Token for token, with a draft that reads features, over 512 ragged prompts."""
  inputs = prompts(512, VOCAB)
  found = speculate(TABLE, drafter_lib.TreeDrafter(NEAR, SHAPES[shape]), *inputs)
  assert_same(found, alone(TABLE, *inputs))
  assert found.lengths.sum() > 1.5 * found.stats.target_calls_b.sum(), 'the draft is too weak'


def decoder(seed=0, **fields):
  return models.tiny(seed, scale=2.5, **fields)


# The windows of Gemma and the distances of T5 are shorter than the tree is deep or wide.
NETWORKS = {'llama': decoder(), 'gemma': decoder(**models.FAMILIES['gemma']),
            'gpt': decoder(**models.FAMILIES['gpt']), 't5': models.tiny_t5(0, scale=2.5)}


@pytest.mark.parametrize('network, shape, batch', [
    ('llama', 'bushy', 8), ('llama', 'dynamic', 1), ('gemma', 'dynamic', 8), ('gpt', 'bushy', 1),
    ('t5', 'bushy', 8)])
def test_greedy_decoding_of_networks_along_trees_is_their_own(network, shape, batch):
  """Caches, positions and masks of real attention; the draft is a language model."""
  model = NETWORKS[network]
  target = model.module.unstacked()
  draft = drafter_lib.LanguageModel(models.perturbed(model, 0.1).module.unstacked())
  drafter = drafter_lib.TreeDrafter(draft, ALL_SHAPES[shape])
  inputs = prompts(256, models.VOCAB)
  expected = alone(target, *inputs)
  emitted = calls = 0
  for start in range(0, min(256, 64 * batch), batch):
    rows = slice(start, start + batch)
    found = speculate(target, drafter, *(array[rows] for array in inputs))
    assert_same(found, expected, rows)
    emitted, calls = emitted + found.lengths.sum(), calls + found.stats.target_calls_b.sum()
  assert emitted > 1.3 * calls, 'the draft is too weak for this test'


@pytest.mark.parametrize('shape', SHAPES)
def test_a_draft_that_knows_the_target_is_followed_to_the_deepest_level(shape):
  """Any slip in the draft's cache, masks, positions or features would cost acceptance."""
  tree = SHAPES[shape]
  if shape == 'dynamic':  # where the sure path is surely kept
    tree = dataclasses.replace(tree, num_nodes=21)
  drafter = drafter_lib.TreeDrafter(trees.TableDraft(TABLE.logits_vvv), tree)
  out = speculate(TABLE, drafter, *prompts(64, VOCAB))
  first_cycles = (prompts(64, VOCAB)[1] == 1).sum()  # no pair to draft from yet
  reached, accepted = out.stats.reached_bg.sum(0), out.stats.accepted_bg.sum(0)
  assert np.all(reached - accepted <= first_cycles) and accepted[-1] > 50


def test_a_token_of_a_tree_is_counted_once_reached():
  """Counts by level: accepted is a prefix, and calls emit what they accept and one token."""
  drafter = drafter_lib.TreeDrafter(NEAR, SHAPES['dynamic'])
  stats = speculate(TABLE, drafter, *prompts(64, VOCAB)).stats
  assert stats.reached_bg.shape == (64, 3)
  np.testing.assert_array_equal(stats.drafted_b, 8 * stats.target_calls_b)
  np.testing.assert_array_equal(stats.reached_bg[:, 0] <= stats.target_calls_b, True)
  assert np.all(stats.accepted_bg <= stats.reached_bg)
  assert np.all(stats.reached_bg[:, 1:] <= stats.accepted_bg[:, :-1])
  whole = stats.accepted_bg.sum(1) + stats.target_calls_b
  assert np.all(stats.emitted_b <= whole) and np.all(stats.emitted_b >= whole - 1)


@pytest.mark.parametrize('drafter', [
    drafter_lib.TreeDrafter(NEAR, tree_lib.EAGLE1, PLAIN),
    drafter_lib.TreeDrafter(NEAR, SHAPES['dynamic'])], ids=['drawn', 'dynamic'])
def test_a_row_depends_neither_on_its_neighbours_nor_on_their_number(drafter):
  prompts_bt, lengths_b = prompts(6, VOCAB)
  keys = jax.random.split(jax.random.key(5), 6)
  how = dict(rule=rules.Exact(), sampling=PLAIN)
  together = speculate(TABLE, drafter, prompts_bt, lengths_b, key=keys, **how)
  order = np.array([4, 0, 5, 2, 1, 3])
  shuffled = speculate(TABLE, drafter, prompts_bt[order], lengths_b[order], key=keys[order], **how)
  assert_same(shuffled, together, order)
  np.testing.assert_array_equal(shuffled.stats.accepted_bg, together.stats.accepted_bg[order])
  for row in (0, 3):
    one = slice(row, row + 1)
    single = speculate(TABLE, drafter, prompts_bt[one], lengths_b[one], key=keys[one], **how)
    assert_same(single, together, one)


def test_where_siblings_are_stored_changes_no_greedy_token():
  inputs = prompts(64, VOCAB)
  one, other = (speculate(TABLE, drafter_lib.TreeDrafter(NEAR, tree), *inputs)
                for tree in (trees.BUSHY, trees.SHUFFLED))
  assert_same(one, other)
  for name in ('target_calls_b', 'reached_bg', 'accepted_bg'):
    np.testing.assert_array_equal(getattr(one.stats, name), getattr(other.stats, name))


@struct.dataclass
class AsTree:
  """A drafter of chains whose chains are proposed as trees of width one."""
  drafter: lm.LMDrafter

  @property
  def gamma(self):
    return self.drafter.gamma

  def prefill(self, *inputs):
    return self.drafter.prefill(*inputs)

  def propose(self, state, key_b):
    proposal = self.drafter.propose(state, key_b)
    branches = tree_lib.chain(self.gamma).branches(len(proposal.tokens_bg), with_laws=True)
    return proposal.replace(branches=branches)

  def commit(self, *inputs):
    return self.drafter.commit(*inputs)


def test_a_chain_proposed_as_a_tree_decodes_the_same():
  """Same keys, same tokens, same counts: tree attention, judging and compaction are the chain's."""
  model = NETWORKS['llama']
  drafter = lm.LMDrafter(models.perturbed(model, 0.1).module.unstacked(), 3, PLAIN)
  inputs = (model.module.unstacked(), prompts(32, models.VOCAB))
  one, other = (speculate(inputs[0], drafter, *inputs[1], rule=rules.Exact(), sampling=PLAIN)
                for drafter in (drafter, AsTree(drafter)))
  assert_same(one, other)
  for name in ('drafted_b', 'target_calls_b', 'reached_bg', 'accepted_bg'):
    np.testing.assert_array_equal(getattr(one.stats, name), getattr(other.stats, name))


def test_block_verification_takes_chains_and_refuses_trees():
  inputs = prompts(8, VOCAB)
  how = dict(rule=rules.Block(), sampling=PLAIN)
  out = speculate(TABLE, drafter_lib.TreeDrafter(NEAR, tree_lib.chain(3), PLAIN), *inputs, **how)
  assert out.stats.accepted_bg.sum() > 0
  with pytest.raises(ValueError, match='judges whole chains'):
    speculate(TABLE, drafter_lib.TreeDrafter(NEAR, trees.BUSHY, PLAIN), *inputs, **how)


def test_the_loop_neither_talks_to_the_host_nor_copies_its_caches():
  """One program, and temporaries well below a second copy of the caches."""
  config = models.config(vocab_size=512, num_layers=4, width=128, num_kv_heads=4, head_dim=32)
  module = jax.eval_shape(lambda: decoder_lib.init(config, jax.random.key(0)).unstacked())
  drafter = drafter_lib.TreeDrafter(drafter_lib.LanguageModel(module), SHAPES['dynamic'])
  for batch in (1, 4):
    state = jax.eval_shape(
        lambda *inputs: engine.prefill_speculative(*inputs, jax.random.key(0),
                                                   max_new_tokens=1000),
        module, drafter, jax.ShapeDtypeStruct((batch, 8), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32))
    lowered = engine.decode_speculative.lower(module, drafter, state, rule=rules.Exact(),
                                              sampling=PLAIN)
    text = lowered.as_text()
    assert 'stablehlo.while' in text and 'callback' not in text
    found = lowered.compile().memory_analysis()
    caches = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(
        (state.target_cache, state.drafter_state)))
    assert found.temp_size_in_bytes < 0.5 * caches, (found.temp_size_in_bytes / caches)
