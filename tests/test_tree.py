"""Tree shapes, their masks, and the dynamic tree against its description in plain words."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdistill_jax.decoding import engine
from specdistill_jax.decoding import tree as tree_lib
from specdistill_jax.decoding import tree_names
from specdistill_jax.drafters import tree as drafter_lib
import laws
import tables
import trees


def test_eagle1_is_the_published_tree():
  """25 nodes on 5 levels, 15 leaves; 5 drafting passes, of widths 1, 4, 4, 1, 1."""
  tree = tree_lib.EAGLE1
  assert tree.num_nodes == 25 and tree.depth == 5
  assert np.bincount(tree.depths_t).tolist() == [1, 4, 8, 8, 3, 2]
  assert len(set(range(1, 26)) - set(tree.parents_m.tolist())) == 15
  assert [len(slots) for slots in tree.expanded] == [1, 4, 4, 1, 1]
  assert tree.num_fed == 10


@pytest.mark.parametrize('tree', [tree_lib.EAGLE1, trees.BUSHY, tree_lib.chain(4)])
def test_a_slot_sees_itself_and_its_ancestors(tree):
  """Said by the paths themselves, and found again on the device from parents alone."""
  paths = [(), *tree.paths]
  expected = [[here[:len(other)] == other for other in paths] for here in paths]
  np.testing.assert_array_equal(tree.ancestors_tt, expected)
  shared = tree.branches(2, with_laws=False)
  grown = tree_lib.grown(shared.parents_bm, shared.ranks_bm, depth=tree.depth, width=shared.width)
  for name in ('parents_bm', 'ranks_bm', 'depths_bt', 'ancestors_btt'):
    np.testing.assert_array_equal(getattr(grown, name), getattr(shared, name))


def test_a_chain_is_the_tree_of_width_one():
  tree = tree_lib.chain(3)
  assert tree.paths == ((0,), (0, 0), (0, 0, 0)) and tree.is_chain
  assert not tree_lib.EAGLE1.is_chain
  np.testing.assert_array_equal(tree.ancestors_tt, np.tril(np.ones((4, 4))))
  assert hash(tree) == hash(tree_lib.chain(3)) and tree == tree_lib.chain(3)


def test_trees_have_names():
  assert tree_names.parse('eagle1') == tree_lib.EAGLE1
  assert tree_names.parse('0 1 00') == tree_lib.Tree(((0,), (1,), (0, 0)))
  assert tree_names.parse('dynamic k10 d6 n60') == tree_lib.Dynamic()
  assert tree_names.parse('0 1 2 00').width == 3 and tree_names.parse('dynamic k9 d2 n4').width == 4


@pytest.mark.parametrize('make, message', [
    (lambda: tree_names.parse('eagle2'),
     "tree is 'eagle2'; it must be 'eagle1', 'medusa', the ranks along"),
    (lambda: tree_names.parse('dynamic k2 d2 n9'), 'draft only 6 tokens'),
    (lambda: tree_names.parse('0 00 01 10'), r'\(1, 0\) has no parent'),
    (lambda: tree_lib.best_children(jnp.zeros((1, 1, 3)), 4), 'gives a node 4 children'),
    (lambda: tree_lib.Tree(()), 'a tree has no paths'),
    (lambda: tree_lib.Tree(((0,), ())), r'tree path \(\) must hold one rank'),
    (lambda: tree_lib.Tree(((0,), (-1,))), r'tree path \(-1,\) must hold one rank, 0 or more'),
    (lambda: tree_lib.Tree(((0,), (1, 0))), r'\(1, 0\) has no parent; \(1,\) must come before'),
    (lambda: tree_lib.Tree(((0, 0), (0,))), r'\(0, 0\) has no parent; \(0,\) must come before'),
    (lambda: tree_lib.Tree(((0,), (1,), (0,))), r'\(0,\) occurs twice'),
    (lambda: tree_lib.Tree(((0,), (2,))), r'\(2,\) leaves out rank 1; \(1,\) must be a node too'),
    (lambda: tree_lib.chain(0), 'a chain has 0 tokens'),
    (lambda: tree_lib.Dynamic(top_k=0), 'top_k is 0; it must be at least 1'),
    (lambda: tree_lib.Dynamic(top_k=2, depth=2, num_nodes=7), 'draft only 6 tokens'),
    (lambda: tree_lib.Dynamic(top_k=9, depth=5, num_nodes=4), 'num_nodes is 4, too few'),
])
def test_a_bad_shape_is_refused_in_one_sentence(make, message):
  with pytest.raises(ValueError, match=message) as caught:
    make()
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('batch', [1, 3])
def test_the_mask_shows_what_is_committed_and_the_ancestors(batch):
  tree, slots = trees.BUSHY, 16
  length_b = jnp.asarray([2, 7, 0][:batch])
  branches = tree.branches(batch, with_laws=False)
  found = tree_lib.mask(length_b, branches.ancestors_btt, slots)
  for row, length in enumerate(length_b.tolist()):
    expected = np.zeros((tree.num_nodes + 1, slots), bool)
    expected[:, :length] = True
    expected[:, length:length + tree.num_nodes + 1] = tree.ancestors_tt
    np.testing.assert_array_equal(found[row], expected)


# The dynamic tree.

@functools.partial(jax.jit, static_argnames=('max_new_tokens',))
def _propose(target, drafter, prompts_bt, lengths_b, max_new_tokens=4):
  state = engine.prefill_speculative(target, drafter, prompts_bt, lengths_b, jax.random.key(0),
                                     max_new_tokens=max_new_tokens)
  return drafter.propose(state, state.key_b)


PROMPTS = np.random.default_rng(0).integers(2, 6, size=(40, 3))


@pytest.mark.parametrize('draft', ['random', 'uniform', 'context_free', 'truncated'])
@pytest.mark.parametrize('tree', [tree_lib.Dynamic(3, 3, 8), tree_lib.Dynamic(2, 4, 5),
                                  tree_lib.Dynamic(3, 2, 12)], ids=str)
def test_the_dynamic_tree_is_the_papers(tree, draft):
  """The very nodes, in their order and ranks: with ties everywhere (`uniform`), with ties between
  different paths (`context_free`), and with a vocabulary that is mostly forbidden (`truncated`)."""
  vocab = 6
  table = tables.random_table(3, vocab).logits_vvv
  table = dict(random=table, uniform=jnp.zeros_like(table),
               context_free=jnp.broadcast_to(jnp.asarray([0., 1., 1., 0., 2., 1.]), table.shape),
               truncated=jnp.where(jnp.arange(vocab) < 4, table, -jnp.inf))[draft]
  drafter = drafter_lib.TreeDrafter(trees.TableDraft(table), tree)
  lengths = np.array([2, 3] * 20)
  proposal = _propose(tables.random_table(0, vocab), drafter, PROMPTS, lengths)
  log_probs = np.asarray(table - jax.nn.logsumexp(table, axis=-1, keepdims=True))
  for row, prompt in enumerate(PROMPTS):
    context = tuple(prompt[:lengths[row]].tolist())
    after = lambda path: log_probs[(*context, *path)[-2:]]
    expected = trees.dynamic_paths(tree, after)
    found = trees.proposed_paths(proposal, row)
    assert set(found.values()) == set(expected)
    for ranks, tokens in found.items():
      best_first = np.argsort(-after(tokens[:-1]), kind='stable')
      assert best_first[ranks[-1]] == tokens[-1]
    thought = [after(tokens[:-1])[tokens[-1]] for tokens in found.values()]
    np.testing.assert_allclose(proposal.branches.draft_log_probs_bm[row], thought, atol=1e-5)


def test_the_dynamic_tree_drops_what_the_draft_doubts():
  """A sure draft is followed to the deepest level, an unsure one stays broad."""
  tree, vocab = tree_lib.Dynamic(3, 4, 6), 6
  table = tables.random_table(1, vocab).logits_vvv
  depth = {}
  for scale in (10.0, 0.1):
    drafter = drafter_lib.TreeDrafter(trees.TableDraft(scale * table), tree)
    proposal = _propose(tables.random_table(0, vocab), drafter, PROMPTS, np.full(40, 3))
    depth[scale] = float(jnp.mean(jnp.max(proposal.branches.depths_bt, axis=1)))
  assert depth[10.0] == 4.0 and depth[0.1] < 2.5


def test_settings_are_static_and_equal_settings_share_a_program():
  table = trees.TableDraft(tables.random_table(0, 5).logits_vvv)
  one, other = (drafter_lib.TreeDrafter(table, tree_lib.Dynamic(2, 2, 4)) for _ in range(2))
  assert jax.tree.structure(one) == jax.tree.structure(other)
  assert jax.tree.structure(one) != jax.tree.structure(
      dataclasses.replace(one, tree=tree_lib.chain(2)))
  assert one.gamma == 2 and one.num_nodes == 4
