"""Judging a drafted tree: down from the root, sibling after sibling, to the first that is kept.

Siblings drawn without replacement are judged by recursive rejection (Miao et al. 2023,
SpecInfer, arXiv 2305.09781; Li et al. 2024, EAGLE, arXiv 2401.15077): each against the draft's law
without its elder siblings, under what the target's law has left after these were refused.
Siblings that follow from the context are drafts with a one-hot law, and all arithmetic on laws but
the last falls away (EAGLE-2). Laws are made of logits only where the walk comes by: a tree has many
more nodes than a path, and warping them all would cost as much as a layer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import judging
from specdistill_jax.decoding import sampling as sampling_lib


def judge(rule: judging.TokenRule, law_at: Callable[[jax.Array], jax.Array],
          proposal: structs.Proposal, key_b: jax.Array
          ) -> tuple[structs.Verdict, jax.Array, jax.Array]:
  """Walks down each row's tree.

  Args:
    law_at: a slot of each row to the target's law after it, `[b] -> [b, v]`, warped.
    proposal: a tree.

  Returns:
    The verdict; the slots of the accepted path, the root first, int32 `[b, depth + 1]`, anything
    behind its end; and how many levels were examined, int32 `[b]`.

  Raises:
    ValueError: a rule that can't judge this tree.
  """
  if not judging.judges_trees(rule):
    raise ValueError(f'rule {rule} judges whole chains; a tree needs one that judges token by '
                     'token: exact, greedy, a lenience or a threshold')
  if proposal.log_probs_bgv is None and getattr(rule, 'lenient_residual', False):
    raise ValueError(f'rule {rule} corrects from a lenient law, which a tree of most probable '
                     'tokens has no short cut for; leave out lenient_residual')
  accept_key_b, next_key_b = sampling_lib.split_rows(key_b, 2)
  b, num_nodes = proposal.tokens_bg.shape
  uniform_bm = jax.vmap(lambda key: jax.random.uniform(key, (num_nodes,)))(accept_key_b)
  siblings = _fixed if proposal.log_probs_bgv is None else _drawn

  def visit(carry):
    slot_b, law_bv, children_bc, path_bt, accepted_b, examined_b = carry
    open_b = jnp.any(children_bc > 0, axis=1)
    child_b, refused_bv = siblings(rule, law_bv, proposal, slot_b, children_bc, uniform_bm)
    kept_b = child_b > 0
    slot_b = jnp.where(kept_b, child_b, slot_b)
    next_bv = jnp.where(kept_b[:, None], law_at(slot_b), refused_bv)
    law_bv = jnp.where(open_b[:, None], next_bv, law_bv)
    children_bc = jnp.where(kept_b[:, None], _children(proposal.branches, slot_b), 0)
    examined_b = examined_b + open_b
    path_bt = jnp.where(jnp.arange(path_bt.shape[1])[None] == examined_b[:, None],
                        slot_b[:, None], path_bt)
    return slot_b, law_bv, children_bc, path_bt, accepted_b + kept_b, examined_b

  zero_b = jnp.zeros((b,), jnp.int32)
  carry = (zero_b, law_at(zero_b), _children(proposal.branches, zero_b),
           jnp.zeros((b, proposal.branches.depth + 1), jnp.int32), zero_b, zero_b)
  _, law_bv, _, path_bt, accepted_b, examined_b = jax.lax.while_loop(
      lambda carry: jnp.any(carry[2] > 0), visit, carry)
  next_b = sampling_lib.draw(next_key_b, law_bv, rule.greedy)
  return structs.Verdict(accepted_b, next_b), path_bt, examined_b


def _children(branches: structs.Branches, slot_b: jax.Array) -> jax.Array:
  """Slots of each row's children by rank, int32 `[b, c]`; 0 where there is none."""
  is_child_bm = branches.parents_bm == slot_b[:, None]
  is_ranked_bmc = branches.ranks_bm[..., None] == jnp.arange(branches.width)
  node_m1 = jnp.arange(1, branches.parents_bm.shape[1] + 1)[:, None]
  return jnp.sum(jnp.where(is_child_bm[..., None] & is_ranked_bmc, node_m1, 0), axis=1,
                 dtype=jnp.int32)


def _at(array_bx: jax.Array, index: jax.Array) -> jax.Array:
  """`array_bx[b, index[b, ...]]`."""
  flat = jnp.take_along_axis(array_bx, index.reshape(index.shape[0], -1), axis=1)
  return flat.reshape(index.shape)


def _fixed(rule, law_bv, proposal, slot_b, children_bc, uniform_bm):
  """Children that follow from the context: all of a row's at once.

  After a sibling was refused the law has nothing left at its token, which changes the other
  tokens' probabilities by a common factor: no law is touched until all are refused. The first that
  the rule keeps is walked on from; Medusa's typical acceptance goes down every kept path and takes
  the longest, which may be longer.
  """
  del slot_b
  present_bc, node_bc = children_bc > 0, jnp.maximum(children_bc - 1, 0)
  token_bc = _at(proposal.tokens_bg, node_bc)
  target_bc = jnp.where(present_bc, _at(law_bv, token_bc), -jnp.inf)
  refused_bv = law_bv
  if rule.corrects:
    prob_bc = jnp.exp(target_bc)
    left_bc = 1.0 - (jnp.cumsum(prob_bc, axis=1) - prob_bc)  # after the elder siblings
    target_bc = target_bc - jnp.log(jnp.maximum(left_bc, 1e-30))
    beyond = law_bv.shape[1]  # is dropped
    refused_bv = jax.vmap(lambda law_v, token_c: law_v.at[token_c].set(-jnp.inf, mode='drop'))(
        law_bv, jnp.where(present_bc, token_bc, beyond))
    # As in `judging.residual_log_probs`: empty by rounding only.
    empty_b1 = jnp.max(refused_bv, axis=1, keepdims=True) == -jnp.inf
    refused_bv = jnp.where(empty_b1, law_bv, refused_bv)
  kept_bc = present_bc & rule.kept(law_bv[:, None], target_bc, jnp.zeros_like(target_bc),
                                   _at(uniform_bm, node_bc))
  first_b = jnp.argmax(kept_bc, axis=1)
  return jnp.where(jnp.any(kept_bc, axis=1), _at(children_bc, first_b[:, None])[:, 0],
                   0), refused_bv


def _drawn(rule, law_bv, proposal, slot_b, children_bc, uniform_bm):
  """Children drawn without replacement: one after the other, until none is left to be judged.

  A child that its siblings left without probability is padding, and so are those after it.
  """
  which_b = _at(proposal.branches.laws_bt, slot_b[:, None])[:, 0]
  left_bv = judging.at_position(proposal.log_probs_bgv, which_b)  # unnormalised
  num_children = children_bc.shape[1]

  def judge_next(carry):
    rank, open_b, chosen_b, law_bv, left_bv = carry
    child_b = jnp.take(children_bc, rank, axis=1)
    node_b1 = jnp.maximum(child_b - 1, 0)[:, None]
    token_b1 = _at(proposal.tokens_bg, node_b1)
    open_b = open_b & (child_b > 0) & (_at(left_bv, token_b1)[:, 0] > -jnp.inf)
    draft_bv = jax.nn.log_softmax(left_bv, axis=-1)
    kept_b1 = rule.kept(law_bv[:, None], _at(law_bv, token_b1), _at(draft_bv, token_b1),
                        _at(uniform_bm, node_b1))
    kept_b = open_b & kept_b1[:, 0]
    open_b = open_b & ~kept_b
    law_bv = jnp.where(open_b[:, None],
                       jax.nn.log_softmax(rule.refused(law_bv, draft_bv), axis=-1), law_bv)
    left_bv = jnp.where(jnp.arange(left_bv.shape[1]) == token_b1, -jnp.inf, left_bv)
    return rank + 1, open_b, jnp.where(kept_b, child_b, chosen_b), law_bv, left_bv

  open_b = children_bc[:, 0] > 0
  _, _, chosen_b, law_bv, _ = jax.lax.while_loop(
      lambda carry: (carry[0] < num_children) & jnp.any(carry[1]), judge_next,
      (jnp.int32(0), open_b, jnp.zeros_like(slot_b), law_bv, left_bv))
  return chosen_b, law_bv
