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
from specdistill_jax.decoding import state as state_lib
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
          'small': trees.SMALL, 'small_shuffled': trees.SMALL_SHUFFLED}
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


def finish(state):
  return jax.device_get(engine.generation(state, max_new_tokens=NEW))


def speculate(target, drafter, prompts_bt, lengths_b, *, rule=rules.Greedy(), sampling=GREEDY,
              key=jax.random.key(1), finish=finish):
  state = engine.prefill_speculative(target, drafter, prompts_bt, lengths_b, key,
                                     max_new_tokens=NEW)
  return finish(engine.decode_speculative(target, drafter, state, rule=rule, sampling=sampling))


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
@functools.cache
def network(name):
  if name == 't5':
    return models.tiny_t5(0, scale=2.5, num_encoder_layers=1, num_decoder_layers=1)
  return decoder(**models.FAMILIES[name])


def test_a_tree_read_at_once_is_each_of_its_paths_read_alone():
  """Its logits, and those after one path was moved into place, in rows of different lengths."""
  module, rng = network('gemma').module.unstacked(), np.random.default_rng(0)
  tree, slots, lengths_b = trees.BUSHY, 20, np.array([3, 6])
  tokens_bs = rng.integers(2, models.VOCAB, size=(2, slots))
  nodes_bt = rng.integers(2, models.VOCAB, size=(2, tree.num_nodes + 1))  # the root's is not read

  @jax.jit
  def read(module, tokens_bs, nodes_bt):
    cache = state_lib.prefill_cache(module, module.init_cache(2, slots), tokens_bs[:, :6],
                                    lengths_b, slots).cache
    root_b1 = jnp.take_along_axis(tokens_bs, lengths_b[:, None] - 1, axis=1)
    block_bt = jnp.concatenate([root_b1, nodes_bt[:, 1:]], axis=1)
    branches = tree.branches(2, with_laws=False)
    mask_bts = tree_lib.mask(lengths_b - 1, branches.ancestors_btt, slots)
    out = module(block_bt, lengths_b[:, None] - 1 + branches.depths_bt, mask_bts, cache)
    cache = out.cache.keep_path(lengths_b - 1, jnp.asarray([path, path]))
    positions_bt, mask_bts = state_lib.block_positions(lengths_b - 1 + len(path), 1, slots)
    after = module(nodes_bt[:, :1], positions_bt, mask_bts, cache.rollback(positions_bt[:, 0]))
    return out.logits_btv, after.logits_btv[:, 0]

  path = [0, *(1 + tree.paths.index(ranks) for ranks in ((0,), (0, 1)))]
  logits_btv, after_bv = read(module, tokens_bs, nodes_bt)
  texts = []
  for row, length in enumerate(lengths_b):
    for ranks in ((), *tree.paths):
      nodes = [1 + tree.paths.index(ranks[:level]) for level in range(1, len(ranks) + 1)]
      texts.append([*tokens_bs[row, :length], *nodes_bt[row, nodes]])
    texts.append([*tokens_bs[row, :length], *nodes_bt[row, path[1:]], nodes_bt[row, 0]])
  padded = np.array([text + [0] * (slots - len(text)) for text in texts])
  expected = jax.jit(lambda module, tokens: module.causal(tokens).logits_btv)(module, padded)
  expected = np.stack([expected[index, len(text) - 1] for index, text in enumerate(texts)])
  found = jnp.concatenate([logits_btv, after_bv[:, None]], axis=1).reshape(expected.shape)
  np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize('name, tree, batch', [
    ('gemma', 'dynamic k2 d3 n7', 8), ('t5', '0 1 00 01 000', 1)])
def test_greedy_decoding_of_networks_along_trees_is_their_own(name, tree, batch):
  """Caches, positions and masks of real attention; the draft is a language model."""
  target = network(name)
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


def test_a_row_depends_neither_on_its_neighbours_nor_on_their_number():
  drafter = drafter_lib.TreeDrafter(NEAR, trees.SMALL, PLAIN)
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
  one, other = greedy('small'), greedy('small_shuffled')
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
  """Same tokens, same counts: tree attention, judging and compaction are the chain's."""
  drafter = lm.LMDrafter(tables.TableModel(NEAR.logits_vvv), 3, GREEDY)
  one, other = (speculate(TABLE, drafter, *prompts(64, VOCAB))
                for drafter in (drafter, AsTree(drafter)))
  assert_same(one, other)
  for name in ('drafted_b', 'target_calls_b', 'reached_bg', 'accepted_bg'):
    np.testing.assert_array_equal(getattr(one.stats, name), getattr(other.stats, name))


def test_block_verification_takes_chains_and_refuses_trees():
  inputs = prompts(8, VOCAB)
  how = dict(rule=rules.Block(), sampling=PLAIN)
  decode = lambda tree: jax.eval_shape(lambda: speculate(
      TABLE, drafter_lib.TreeDrafter(NEAR, tree, PLAIN), *inputs, **how, finish=lambda x: x))
  assert decode(tree_lib.chain(3)).stats.accepted_bg.shape == (8, 3)
  with pytest.raises(ValueError, match='judges whole chains'):
    decode(trees.SMALL)


def test_a_tree_that_is_looked_at_is_one_of_the_loops():
  """What it says was kept is in the text that the loop decodes, as sure as the draft was."""
  setting = step_costs.Setting(drafter_lib.TreeDrafter(NEAR, trees.SMALL), rules.Greedy())
  (prompts_bt, lengths_b), text = prompts(ROWS, VOCAB), greedy('small')
  seen = drafted.look(TABLE, setting, prompts_bt, lengths_b, jax.random.key(1), sampling=GREEDY,
                      max_new_tokens=NEW)
  assert seen.parents == trees.SMALL.parents_m.tolist() and len(seen.kept) > 2
  told = [seen.words[slot] for slot in seen.kept] + [seen.next_word] * (seen.next_word is not None)
  row = [*prompts_bt[0, :lengths_b[0]], *text.tokens[0, :text.lengths[0]]]
  assert ' '.join(told) in ' '.join(map(str, row))
  law = np.asarray(jax.nn.softmax(NEAR.logits_vvv))
  for node, parent in enumerate(seen.parents, start=1):
    assert parent < node
    if parent:
      context = seen.words[seen.parents[parent - 1]], seen.words[parent], seen.words[node]
      assert seen.probabilities[node - 1] == pytest.approx(law[tuple(map(int, context))], rel=1e-5)


def test_the_loop_neither_talks_to_the_host_nor_copies_its_caches():
  """One program, and temporaries well below a second copy of the caches."""
  config = models.config(vocab_size=512, width=128, num_kv_heads=4, head_dim=32)
  module = jax.eval_shape(lambda: decoder_lib.init(config, jax.random.key(0)).unstacked())
  drafter = drafter_lib.TreeDrafter(drafter_lib.LanguageModel(module),
                                    tree_lib.Dynamic(2, 2, 4))
  for batch in (1, 4):
    state = jax.eval_shape(
        lambda *inputs: engine.prefill_speculative(*inputs, jax.random.key(0),
                                                   max_new_tokens=1000),
        module, drafter, jax.ShapeDtypeStruct((batch, 8), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32))
    lowered = engine.decode_speculative.lower(module, drafter, state, rule=rules.Greedy(),
                                              sampling=GREEDY)
    text = lowered.as_text()
    assert 'stablehlo.while' in text and 'callback' not in text
    found = lowered.compile().memory_analysis()
    caches = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(
        (state.target_cache, state.drafter_state)))
    assert found.temp_size_in_bytes < 0.5 * caches, (found.temp_size_in_bytes / caches)
