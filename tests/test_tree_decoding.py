"""Trees in the decoding loop: greedy equality, rows, counts, caches, chains."""

import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import tables
import trees
from specdistill_jax import api
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import tree as tree_lib
from specdistill_jax.drafters import lm
from specdistill_jax.drafters import tree as drafter_lib
from specdistill_jax.evaluation import drafted
from specdistill_jax.evaluation import step_costs
from specdistill_jax.models import decoder as decoder_lib

GREEDY, PLAIN = sampling_lib.Sampling(0.0), sampling_lib.Sampling(1.0)
NEW = 20
VOCAB = 7
ROWS = 512
# The dynamic tree has room for the draft's best path, whatever else it is sure of: 3 + 9 + 1.
SHAPES = {'eagle1': tree_lib.EAGLE1, 'dynamic': tree_lib.Dynamic(3, 3, 13),
          'bushy': trees.BUSHY, 'shuffled': trees.SHUFFLED}
BOTH_KINDS = ('eagle1', 'dynamic')


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


@functools.cache
def greedy(shape):
  return speculate(TABLE, drafter_lib.TreeDrafter(NEAR, SHAPES[shape]), *prompts(ROWS, VOCAB))


@pytest.mark.parametrize('shape', BOTH_KINDS)
def test_greedy_decoding_along_trees_is_the_targets_own(shape):
  """Token for token, with a draft that reads features, over 512 ragged prompts."""
  found = greedy(shape)
  assert_same(found, alone(TABLE, *prompts(ROWS, VOCAB)))
  assert found.lengths.sum() > 1.5 * found.stats.target_calls_b.sum(), 'the draft is too weak'


def decoder(seed=0, **fields):
  return models.tiny(seed, scale=2.5, **fields)


# The windows of Gemma and the distances of T5 are shorter than the tree is deep or wide.
NETWORKS = {'llama': decoder, 'gemma': lambda: decoder(**models.FAMILIES['gemma']),
            'gpt': lambda: decoder(**models.FAMILIES['gpt']),
            't5': lambda: models.tiny_t5(0, scale=2.5)}


@pytest.mark.parametrize('network, tree, batch', [
    ('llama', 'dynamic k3 d3 n8', 1), ('gemma', 'dynamic k3 d3 n8', 8),
    ('gpt', '0 1 2 00 01 10 000', 1), ('t5', '0 1 2 00 01 10 000', 8)])
def test_greedy_decoding_of_networks_along_trees_is_their_own(network, tree, batch):
  """Caches, positions and masks of real attention; the draft is a language model."""
  target = NETWORKS[network]()
  draft = models.perturbed(target, 0.1)
  rows = [row[:length].tolist() for row, length in zip(*prompts(256, models.VOCAB))]
  common = dict(max_new_tokens=NEW, temperature=0.0, key=jax.random.key(0), prompt_width=8)
  expected = api.generate(target, rows, **common)
  emitted = calls = 0
  for start in range(0, min(256, 64 * batch), batch):
    chosen = slice(start, start + batch)
    found = api.speculate(target, draft, rows[chosen], tree=tree, **common)
    assert_same(found, expected, chosen)
    emitted, calls = emitted + found.lengths.sum(), calls + found.stats.target_calls_b.sum()
  assert emitted > 1.3 * calls, 'the draft is too weak for this test'


@pytest.mark.parametrize('shape', BOTH_KINDS)
def test_a_draft_that_knows_the_target_is_followed_to_the_deepest_level(shape):
  """Any slip in the draft's cache, masks, positions or features would cost acceptance."""
  drafter = drafter_lib.TreeDrafter(trees.TableDraft(TABLE.logits_vvv), SHAPES[shape])
  out = speculate(TABLE, drafter, *prompts(ROWS, VOCAB))
  first_cycles = (prompts(ROWS, VOCAB)[1] == 1).sum()  # no pair to draft from yet
  reached, accepted = out.stats.reached_bg.sum(0), out.stats.accepted_bg.sum(0)
  assert np.all(reached - accepted <= first_cycles) and accepted[-1] > 50


def test_a_token_of_a_tree_is_counted_once_reached():
  """Counts by level: accepted is a prefix, and calls emit what they accept and one token."""
  stats = greedy('dynamic').stats
  assert stats.reached_bg.shape == (ROWS, 3)
  np.testing.assert_array_equal(stats.drafted_b, 13 * stats.target_calls_b)
  np.testing.assert_array_equal(stats.reached_bg[:, 0] <= stats.target_calls_b, True)
  assert np.all(stats.accepted_bg <= stats.reached_bg)
  assert np.all(stats.reached_bg[:, 1:] <= stats.accepted_bg[:, :-1])
  whole = stats.accepted_bg.sum(1) + stats.target_calls_b
  assert np.all(stats.emitted_b <= whole) and np.all(stats.emitted_b >= whole - 1)


@pytest.mark.parametrize('drafter', [
    drafter_lib.TreeDrafter(NEAR, trees.BUSHY, PLAIN),
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
  one, other = greedy('bushy'), greedy('shuffled')
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
  drafter = lm.LMDrafter(tables.TableModel(NEAR.logits_vvv), 3, PLAIN)
  one, other = (speculate(TABLE, drafter, *prompts(64, VOCAB), rule=rules.Exact(), sampling=PLAIN)
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


def test_a_tree_that_is_looked_at_is_one_of_the_loops():
  """What it says was kept is in the text that the loop decodes, as sure as the draft was."""
  setting = step_costs.Setting(drafter_lib.TreeDrafter(NEAR, trees.BUSHY), rules.Greedy())
  (prompts_bt, lengths_b), text = prompts(ROWS, VOCAB), greedy('bushy')
  seen = drafted.look(TABLE, setting, prompts_bt, lengths_b, jax.random.key(1), sampling=GREEDY,
                      max_new_tokens=NEW)
  assert seen.parents == trees.BUSHY.parents_m.tolist() and len(seen.kept) > 2
  told = [*(seen.words[slot] for slot in seen.kept), seen.next_word]
  row = [*prompts_bt[0, :lengths_b[0]], *text.tokens[0, :text.lengths[0]]]
  assert ' '.join(told) in ' '.join(map(str, row))
  law = jax.nn.softmax(NEAR.logits_vvv)
  for node, parent in enumerate(seen.parents, start=1):
    assert parent < node
    if parent:
      context = seen.words[seen.parents[parent - 1]], seen.words[parent], seen.words[node]
      assert seen.probabilities[node - 1] == pytest.approx(law[tuple(map(int, context))], rel=1e-5)


def test_the_loop_neither_talks_to_the_host_nor_copies_its_caches():
  """One program, and temporaries well below a second copy of the caches."""
  config = models.config(vocab_size=512, width=128, num_kv_heads=4, head_dim=32)
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
