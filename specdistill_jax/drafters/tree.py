"""Drafting trees with any draft that can be run a step at a time.

A draft (`TreeDraft`) reads pairs: a target's feature, and the token that follows it (EAGLE,
FSPAD, EAGLE-3). At drafted tokens its own output stands in for the feature. A cycle begins by
feeding the pairs that the target has verified since, with its true features; the tree is drafted
from there, and what drafting has left in the draft's cache is forgotten (Li et al. 2024, arXiv
2401.15077 and 2406.16858). A language model is a draft whose features nobody reads.
"""

import functools
from typing import Any, ClassVar, Protocol

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from specdistill_jax import structs
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib
from specdistill_jax.decoding import tree as tree_lib


class TreeDraft(Protocol):
  """A draft, a pytree of its parameters.

  `read` is fed the tokens of pairs, with the vectors that stand beside them. Like a
  `structs.TargetFn` it writes them at each row's `cache.length_b`; pair i has position i. What it
  returns is for the head, and `carried_btd` is what stands beside a drafted token after it.
  `logits` are about what follows each token, over the target's vocabulary.

  Two more attributes may be there: `first_token`, 0 for a draft that reads a text's first token
  too, which no pair holds; and `start`, as in `structs.Decodable`, for a draft that doesn't begin
  with the prompts themselves. Its memory, if any, goes to `init_cache` as a third argument.
  """

  def inputs(self, target_output: structs.TargetOutput) -> jax.Array:
    """`carried_btd` from the target's features."""

  def init_cache(self, batch: int, num_slots: int) -> Any:
    ...

  def read(self, tokens_bt: jax.Array, carried_btd: jax.Array, positions_bt: jax.Array,
           mask_bts: jax.Array, cache: Any) -> tuple[jax.Array, jax.Array, Any]:
    """Returns `read_btd`, `carried_btd` and the cache."""

  def logits(self, read_btd: jax.Array) -> jax.Array:
    ...


@struct.dataclass
class LanguageModel:
  """A language model as a draft of trees.

  Attributes:
    module: the model, layers unrolled; a `structs.Decodable` of the target's family.
  """
  module: Any
  first_token: ClassVar[int] = 0

  def start(self, prompts_bt, prompt_lengths_b):
    return self.module.start(prompts_bt, prompt_lengths_b)

  def init_cache(self, batch, num_slots, memory=None):
    return self.module.init_cache(batch, num_slots, memory)

  def inputs(self, target_output):
    return jnp.zeros((*target_output.logits_btv.shape[:2], 0))

  def read(self, tokens_bt, carried_btd, positions_bt, mask_bts, cache):
    output = self.module(tokens_bt, positions_bt, mask_bts, cache)
    return output.features['final_btd'], carried_btd, output.cache

  def logits(self, read_btd):
    return self.module.logits(read_btd)


@struct.dataclass
class TreeState:
  """Attributes:
    cache: the draft's, of true pairs.
    carried_btd: of the verified pairs that were not yet fed, `[b, gamma + 1, d]`.
  """
  cache: Any
  carried_btd: jax.Array


@struct.dataclass
class TreeDrafter:
  """Drafts a tree a cycle; a tree of width one is proposed as the chain that it is.

  Attributes:
    draft: what is run.
    tree: the shape, static or dynamic.
    sampling: the law that siblings are drawn from without replacement, in a static tree; None, or
      temperature 0: siblings are the most probable tokens, as they always are in a dynamic tree.
  """
  draft: TreeDraft
  tree: tree_lib.Tree | tree_lib.Dynamic = struct.field(pytree_node=False)
  sampling: sampling_lib.Sampling | None = struct.field(pytree_node=False, default=None)

  @property
  def gamma(self) -> int:
    return self.tree.depth

  @property
  def num_nodes(self) -> int:
    return self.tree.num_nodes

  @property
  def _first(self) -> int:
    return getattr(self.draft, 'first_token', 1)

  @property
  def _drawn_from(self) -> sampling_lib.Sampling | None:
    return None if self.sampling is None or self.sampling.is_greedy else self.sampling

  def _slots(self, slots: int) -> int:
    """Of the draft's cache: it holds what is expanded, which may be more than what is verified."""
    return slots + max(self.tree.num_fed - self.num_nodes, 0)

  def prefill(self, prompts_bt, prompt_lengths_b, target_output, slots):
    """Feeds the prompts' pairs; the last one waits, as those of later cycles do."""
    start = getattr(self.draft, 'start', structs.Start)(prompts_bt, prompt_lengths_b)
    memory = () if start.memory is None else (start.memory,)
    b, t = start.tokens_bt.shape
    slots = self._slots(slots)
    cache = self.draft.init_cache(b, slots, *memory)
    carried_btd = self.draft.inputs(target_output)
    if t > self._first:
      beside_btd = carried_btd[:, :t - 1]  # of the tokens from the second on
      if not self._first:
        beside_btd = jnp.pad(beside_btd, ((0, 0), (1, 0), (0, 0)))
      positions_bt, mask_bts = state_lib.block_positions(
          jnp.zeros((b,), jnp.int32), t - self._first, slots)
      _, _, cache = self.draft.read(start.tokens_bt[:, self._first:], beside_btd, positions_bt,
                                    mask_bts, cache)
    last_b = jnp.maximum(start.lengths_b - 2, 0)
    waiting_b1d = tree_lib.along(carried_btd, last_b[:, None])
    return TreeState(cache.rollback(jnp.maximum(start.lengths_b - 1 - self._first, 0)),
                     jnp.pad(waiting_b1d, ((0, 0), (0, self.gamma), (0, 0))))

  def propose(self, state, key_b):
    """Feeds what is committed by now, then drafts; the cache goes back to what is committed."""
    slots = self._slots(state.tokens_bs.shape[1])
    num_pairs_b = state.lengths_b - self._first
    logits_b1v, carried_b1d, cache = self._catch_up(state, num_pairs_b, slots)

    def feed(tokens_bt, carried_btd, level, sees_btu, cache):
      """Drafted tokens of one level, which see committed pairs and drafted ancestors."""
      positions_bt = jnp.broadcast_to(num_pairs_b[:, None] + level - 1, tokens_bt.shape)
      read_btd, carried_btd, cache = self.draft.read(
          tokens_bt, carried_btd, positions_bt, tree_lib.mask(num_pairs_b, sees_btu, slots), cache)
      return self.draft.logits(read_btd), carried_btd, cache

    if isinstance(self.tree, tree_lib.Dynamic):
      proposal = _grow(self.tree, feed, logits_b1v, carried_b1d, cache)
    else:
      children = functools.partial(_children, sampling=self._drawn_from)
      proposal = _fill(self.tree, feed, children, key_b, logits_b1v, carried_b1d, cache)
    return proposal.replace(drafter_state=state.drafter_state.replace(
        cache=proposal.drafter_state.rollback(num_pairs_b)))

  def commit(self, state, proposal, verdict, target_output):
    """Keeps the target's features for the next cycle, which feeds as many as were accepted."""
    del state, verdict
    return proposal.drafter_state.replace(carried_btd=self.draft.inputs(target_output))

  def _catch_up(self, state, num_pairs_b, slots):
    """Feeds the pairs committed since the last time; what the draft makes of each row's last."""
    cache, carried_btd = state.drafter_state.cache, state.drafter_state.carried_btd
    last_b = jnp.maximum(num_pairs_b - cache.length_b, 1) - 1
    positions_bt, mask_bts = state_lib.block_positions(cache.length_b, self.gamma + 1, slots)
    index_bt = jnp.minimum(positions_bt + self._first, state.lengths_b[:, None] - 1)
    tokens_bt = jnp.take_along_axis(state.tokens_bs, index_bt, axis=1)
    read_btd, carried_btd, cache = self.draft.read(tokens_bt, carried_btd, positions_bt, mask_bts,
                                                   cache)
    last = lambda x_btd: tree_lib.along(x_btd, last_b[:, None])
    # The head is the dearest layer of a small draft: read at one place a row.
    return self.draft.logits(last(read_btd)), last(carried_btd), cache.rollback(num_pairs_b)


def _children(key_b, logits_btv, num, *, sampling):
  """Tokens to follow each expanded one, `[b, t, c]`, their log-probabilities, and their law."""
  if sampling is None:
    log_probs_btc, tokens_btc = tree_lib.best_children(logits_btv, num)
    return tokens_btc, log_probs_btc, None
  b, t, v = logits_btv.shape
  law_btv = sampling_lib.warp(logits_btv, sampling)
  key_bt = sampling_lib.split_rows(key_b, t).swapaxes(0, 1)
  tokens_btc = sampling_lib.without_replacement(
      key_bt.reshape(b * t), law_btv.reshape(b * t, v), num).reshape(b, t, num)
  return tokens_btc, jnp.take_along_axis(law_btv, tokens_btc, axis=-1), law_btv


def _fill(tree, feed, children, key_b, logits_btv, carried_btd, cache):
  """Drafts a static tree, level by level."""
  key_gb = sampling_lib.split_rows(key_b, tree.depth)
  fed, stored, drafted, thought, laws = [], [], [], [], []
  for level, slots in enumerate(tree.expanded):
    if level:  # `nodes` are still those of the level above, some of which are fed now
      above = tree.expanded[level - 1]
      parents = np.array([above.index(tree.parents_m[slot - 1]) for slot in slots])
      fed.extend(slots)
      sees_btu = jnp.broadcast_to(tree.ancestors_tt[np.ix_(slots, fed)],
                                  (len(key_b), len(slots), len(fed)))
      tokens_bt = drafted[-1][:, np.array([nodes.index(slot - 1) for slot in slots])]
      logits_btv, carried_btd, cache = feed(tokens_bt, carried_btd[:, parents], level, sees_btu,
                                            cache)
    nodes = np.flatnonzero(tree.depths_t[1:] == level + 1).tolist()
    rows = np.array([slots.index(tree.parents_m[node]) for node in nodes])
    *children_btc, law_btv = children(key_gb[level], logits_btv, tree.ranks_m[nodes].max() + 1)
    for parts, found_btc in zip((drafted, thought), children_btc):
      parts.append(found_btc[:, rows, tree.ranks_m[nodes]])
    stored += nodes
    laws.append(law_btv)
  tokens_bg, thought_bg = (jnp.concatenate(parts, axis=1)[:, np.argsort(stored)]
                           for parts in (drafted, thought))
  is_drawn = laws[0] is not None
  log_probs_bgv = jnp.concatenate(laws, axis=1) if is_drawn else None
  if tree.is_chain:
    if not is_drawn:
      log_probs_bgv = sampling_lib.one_hot_log_probs(tokens_bg, logits_btv.shape[-1])
    return structs.Proposal(tokens_bg, log_probs_bgv, cache)
  branches = tree.branches(len(tokens_bg), is_drawn)
  return structs.Proposal(tokens_bg, log_probs_bgv, cache,
                          branches=branches.replace(draft_log_probs_bm=thought_bg))


def _grow(tree, feed, logits_btv, carried_btd, cache):
  """Drafts a dynamic tree: expands the best nodes of each level, keeps the best of all."""
  b, k = logits_btv.shape[0], tree.top_k
  scores_bk, tokens_bk = (x[:, 0] for x in tree_lib.best_children(logits_btv, k))
  pool = [(tokens_bk, scores_bk, jnp.zeros((b, k), jnp.int32))]  # and the parent, a pool slot
  slots_bk = jnp.broadcast_to(jnp.arange(1, k + 1), (b, k))
  rows_bk, sees_bku = jnp.zeros((b, k), jnp.int32), jnp.zeros((b, k, 0), bool)
  for level in range(1, tree.depth):
    own_bkk = jnp.broadcast_to(jnp.eye(k, dtype=bool), (b, k, k))
    sees_bku = jnp.concatenate([sees_bku, own_bkk], axis=-1)
    logits_bkv, carried_btd, cache = feed(
        tokens_bk, tree_lib.along(carried_btd, rows_bk), level, sees_bku, cache)
    found_bkk, children_bkk = tree_lib.best_children(logits_bkv, k)
    flat = lambda array: array.reshape(b, k * k)
    scores, tokens = flat(scores_bk[..., None] + found_bkk), flat(children_bkk)
    begin = sum(one[0].shape[1] for one in pool)
    pool.append((tokens, scores, jnp.repeat(slots_bk, k, axis=1)))
    scores_bk, chosen_bk = jax.lax.top_k(scores, k)
    rows_bk, tokens_bk = chosen_bk // k, tree_lib.along(tokens, chosen_bk)
    slots_bk, sees_bku = begin + 1 + chosen_bk, tree_lib.along(sees_bku, rows_bk)
  tokens_bg, branches = tree_lib.best_nodes(
      tree, *(jnp.concatenate(parts, axis=1) for parts in zip(*pool)))
  return structs.Proposal(tokens_bg, None, cache, branches=branches)
