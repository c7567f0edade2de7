"""Judging trees: a chain is a tree, order of storage is nothing, one-hot laws need no laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdistill_jax import structs
from specdistill_jax.decoding import judging
from specdistill_jax.decoding import lossy_rules
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import tree as tree_lib
from specdistill_jax.decoding import tree_judging
import trees

ROWS, VOCAB = 3000, 6
RULES = [rules.Exact(), rules.Greedy(),
         lossy_rules.Lenient('exponential', 0.5, lenient_residual=True),
         lossy_rules.Threshold('typical', 0.5, greedy=False),
         lossy_rules.Threshold('top_k', 0.5, greedy=True)]


@jax.jit(static_argnames=('rule',))
def judge(rule, target_btv, proposal, key_b):
  law_at = lambda slot_b: judging.at_position(target_btv, slot_b)
  return tree_judging.judge(rule, law_at, proposal, key_b)


@functools.cache
def drafted(tree, with_laws):
  """Target laws after every slot, a proposal, keys. Siblings are drawn, or most probable.

  In NumPy: the greatest sums of log-probability and Gumbel noise are draws without replacement.
  """
  rng = np.random.default_rng(0)
  def laws(num):
    logits = 1.5 * rng.normal(size=(ROWS, num, VOCAB))
    return (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).astype(np.float32)
  draft_bev = laws(sum(map(len, tree.expanded)))
  noise_bev = rng.gumbel(size=draft_bev.shape) if with_laws else 0.0
  tokens_bev = np.argsort(-(draft_bev + noise_bev), axis=-1)
  branches = tree.branches(ROWS, with_laws)
  laws_t = np.asarray(tree.branches(1, with_laws=True).laws_bt[0])
  tokens_bm = tokens_bev[:, laws_t[tree.parents_m], tree.ranks_m].astype(np.int32)
  proposal = structs.Proposal(jnp.asarray(tokens_bm), jnp.asarray(draft_bev) if with_laws else None,
                              None, branches=branches)
  return (jnp.asarray(laws(tree.num_nodes + 1)), proposal,
          jax.random.split(jax.random.key(0), ROWS))


@pytest.mark.parametrize('rule', RULES, ids=str)
def test_a_chain_judged_as_a_tree_keeps_and_emits_the_same(rule):
  """Draw for draw."""
  target_btv, proposal, key_b = drafted(tree_lib.chain(3), with_laws=True)
  chain = jax.jit(rule)(target_btv, proposal.replace(branches=None), key_b)
  found, path_bt, examined_b = judge(rule, target_btv, proposal, key_b)
  np.testing.assert_array_equal(found.num_accepted_b, chain.num_accepted_b)
  np.testing.assert_array_equal(found.next_token_b, chain.next_token_b)
  np.testing.assert_array_equal(examined_b, jnp.minimum(found.num_accepted_b + 1, 3))
  for row in range(50):
    kept = int(found.num_accepted_b[row])
    assert path_bt[row, :kept + 1].tolist() == list(range(kept + 1))
  assert 0.1 < found.num_accepted_b.mean() < 2.9


def after_elders(rule, tree, target_btv, tokens_bm):
  """The target's law where each node is judged: where a rule corrects, without elder siblings."""
  law_bmv = target_btv[:, tree.parents_m]
  if rule.corrects:
    row_b = np.arange(len(tokens_bm))
    for node, path in enumerate(tree.paths):
      for elder in range(path[-1]):
        token_b = tokens_bm[:, tree.paths.index((*path[:-1], elder))]
        law_bmv[row_b, node, token_b] = 0.0
    law_bmv /= law_bmv.sum(axis=-1, keepdims=True)
  return law_bmv


@pytest.mark.parametrize('rule', [rule for rule in RULES if
                                  not getattr(rule, 'lenient_residual', False)], ids=str)
def test_fixed_siblings_are_siblings_drawn_from_one_hot_laws(rule):
  """The short cut through scalars against recursive rejection in float64, draw for draw."""
  tree = trees.BUSHY
  target_btv, proposal, key_b = drafted(tree, with_laws=False)
  found, path_bt, _ = judge(rule, target_btv, proposal, key_b)
  accept_key_b, _ = sampling_lib.split_rows(key_b, 2)
  uniform_bm = jax.vmap(lambda key: jax.random.uniform(key, (tree.num_nodes,)))(accept_key_b)
  target_btv, tokens_bm = np.exp(np.asarray(target_btv, np.float64)), np.asarray(proposal.tokens_bg)
  law_bmv = after_elders(rule, tree, target_btv, tokens_bm)
  own_bm = np.take_along_axis(law_bmv, tokens_bm[..., None], axis=-1)[..., 0]
  with np.errstate(divide='ignore'):
    kept_bm = np.asarray(jax.jit(rule.kept)(np.log(law_bmv), np.log(own_bm), 0.0, uniform_bm))
  found, path_bt = jax.device_get((found, path_bt))
  for row in range(ROWS):
    expected, ranks, open_ = [0], (), True
    while open_:
      children = [node for node, path in enumerate(tree.paths) if path[:-1] == ranks]
      chosen = next((node for node in children if kept_bm[row, node]), None)
      open_ = chosen is not None
      if open_:
        ranks, expected = tree.paths[chosen], [*expected, chosen + 1]
    assert path_bt[row, :len(expected)].tolist() == expected
    assert found.num_accepted_b[row] == len(expected) - 1
    refused = tokens_bm[row, children] if rule.corrects else ()
    assert found.next_token_b[row] not in refused


@pytest.mark.parametrize('rule', [rules.Greedy(), lossy_rules.Threshold('top_k', 0.5, greedy=True)],
                         ids=str)
@pytest.mark.parametrize('with_laws', [False, True])
def test_where_siblings_are_stored_changes_nothing(rule, with_laws):
  """Rules that don't draw give the very same; for the others, see the laws of `shuffled`."""
  tree, target_rows = trees.BUSHY, drafted(trees.BUSHY, with_laws)
  target_btv, proposal, key_b = target_rows
  order = np.array([2, 0, 4, 3, 7, 6, 1, 5])  # nodes by their new places
  shuffled = tree_lib.Tree(tuple(tree.paths[node] for node in order))
  branches = shuffled.branches(ROWS, with_laws)
  if with_laws:  # the laws stay where they were
    laws_bt = proposal.branches.laws_bt[:, np.concatenate([[0], order + 1])]
    branches = branches.replace(laws_bt=laws_bt)
  other = proposal.replace(tokens_bg=proposal.tokens_bg[:, order], branches=branches)
  one_verdict, one_path, _ = judge(rule, target_btv, proposal, key_b)
  two_verdict, two_path, _ = judge(
      rule, target_btv[:, np.concatenate([[0], order + 1])], other, key_b)
  np.testing.assert_array_equal(one_verdict.num_accepted_b, two_verdict.num_accepted_b)
  np.testing.assert_array_equal(one_verdict.next_token_b, two_verdict.next_token_b)
  place = np.concatenate([[0], np.argsort(order) + 1])
  kept = np.arange(4)[None] <= np.asarray(one_verdict.num_accepted_b)[:, None]
  np.testing.assert_array_equal(np.where(kept, place[one_path], -1), np.where(kept, two_path, -1))
  assert one_verdict.num_accepted_b.max() == 3


def draws(law, seed):
  """60,000 times three draws without replacement."""
  draw = jax.jit(sampling_lib.without_replacement, static_argnums=2)
  log_law = jnp.log(jnp.broadcast_to(jnp.asarray(law, jnp.float32), (60_000, 4)))
  return np.asarray(draw(jax.random.split(jax.random.key(seed), 60_000), log_law, 3)), log_law


def emitted(tokens, log_draft, target, seed):
  """The first token of cycles whose root has three children; verdicts and accepted slots."""
  tree, count = tree_lib.Tree(((0,), (1,), (2,))), len(tokens)
  proposal = structs.Proposal(jnp.asarray(tokens), log_draft[:, None], None,
                              branches=tree.branches(count, with_laws=True))
  target_btv = jnp.broadcast_to(jnp.log(jnp.asarray(target, jnp.float32)), (count, 4, 4))
  verdict, path_bt, _ = jax.device_get(judge(rules.Exact(), target_btv, proposal,
                                             jax.random.split(jax.random.key(seed), count)))
  slot_b = np.where(verdict.num_accepted_b == 1, path_bt[:, 1], 0)
  first = tokens[np.arange(count), np.maximum(slot_b - 1, 0)]
  return np.where(slot_b > 0, first, verdict.next_token_b), slot_b


def deviation(tokens, law):
  """The largest, in standard deviations of what is expected."""
  law = np.asarray(law)
  shares = np.bincount(tokens, minlength=4) / len(tokens)
  return np.max(np.abs(shares - law) / np.sqrt(law * (1 - law) / len(tokens)))


TARGET = np.array([0.3, 0.2, 0.4, 0.1])


def test_siblings_beyond_the_drafts_support_are_never_kept():
  """A law of two tokens has no third sibling: filler is skipped, and the law stays exact."""
  tokens, log_draft = draws([0.5, 0.5, 0.0, 0.0], 0)
  assert set(map(tuple, tokens[:, :2].tolist())) == {(0, 1), (1, 0)}
  found, slot_b = emitted(tokens, log_draft, TARGET, 2)
  assert not np.any(slot_b == 3) and deviation(found, TARGET) < 4
  # Both tokens were offered: what is refused at last is a token that was never offered.
  assert np.all(found[slot_b == 0] >= 2)


def test_a_misstated_draft_law_shows():
  """Three of four tokens are offered: exact under the law that they were drawn from only."""
  tokens, log_draft = draws([0.5, 0.3, 0.15, 0.05], 1)
  assert deviation(emitted(tokens, log_draft, TARGET, 2)[0], TARGET) < 4
  assert deviation(emitted(tokens, 0.5 * log_draft, TARGET, 2)[0], TARGET) > 8


def test_draws_without_replacement_have_their_law():
  """P(i, j) = p_i p_j / (1 - p_i), in order."""
  law = np.array([0.5, 0.3, 0.15, 0.05])
  drawn, _ = draws(law, 1)
  assert all(len(set(row)) == 3 for row in drawn[:1000].tolist())
  found = np.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16).reshape(4, 4) / len(drawn)
  expected = law[:, None] * law[None] / (1 - law[:, None]) * (1 - np.eye(4))
  assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected / len(drawn)) + 1e-9)


@pytest.mark.parametrize('rule, with_laws, message', [
    (rules.Block(), True, r'rule Block\(\) judges whole chains; a tree needs one that judges'),
    (lossy_rules.Lenient('linear', 0.5, lenient_residual=True), False, 'leave out lenient_res'),
])
def test_a_rule_that_cannot_judge_a_tree_says_so(rule, with_laws, message):
  target_btv, proposal, key_b = drafted(trees.BUSHY, with_laws)
  with pytest.raises(ValueError, match=message) as caught:
    judge(rule, target_btv, proposal, key_b)
  assert '\n' not in str(caught.value)
