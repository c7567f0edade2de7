"""Trees of drafted tokens: their shapes, and how a target reads one.

A static tree (`Tree`) is known before anything is drafted: EAGLE-1's, Medusa's, a chain. A
dynamic one (`Dynamic`, EAGLE-2) grows where the draft is confident. Both are small hashable
values; everything that follows from a static shape is computed once, in NumPy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from specdistill_jax import structs


@dataclasses.dataclass(frozen=True)
class Tree:
  """A static tree, given by the ranks along the path from the root to each node.

  `((0,), (1,), (0, 0))` has the two best tokens, and after the better one its best token.

  Attributes:
    paths: one tuple of ranks a node, in the order in which nodes are stored; a node's parent
      comes before it.
  """
  paths: tuple[tuple[int, ...], ...]

  def __post_init__(self):
    if not self.paths:
      raise ValueError('a tree has no paths; it needs one for each drafted token')
    known = {()}
    for path in self.paths:
      if not path or min(path) < 0:
        raise ValueError(f'tree path {path} must hold one rank, 0 or more, for each level')
      if path in known:
        raise ValueError(f'tree path {path} occurs twice; each node has one')
      if path[:-1] not in known:
        raise ValueError(f'tree path {path} has no parent; {path[:-1]} must come before it')
      known.add(path)
    for path in self.paths:
      elder = (*path[:-1], path[-1] - 1)
      if path[-1] and elder not in known:
        raise ValueError(f'tree path {path} leaves out rank {path[-1] - 1}; {elder} must be a '
                         'node too')

  @property
  def num_nodes(self) -> int:
    return len(self.paths)

  @functools.cached_property
  def depth(self) -> int:
    """The deepest level: the most tokens that a cycle can keep."""
    return max(map(len, self.paths))

  @functools.cached_property
  def width(self) -> int:
    """The most children that a node has."""
    return max(path[-1] for path in self.paths) + 1

  @functools.cached_property
  def parents_m(self) -> np.ndarray:
    """The slot of each node's parent; 0 is the root, i + 1 node i."""
    slots = {(): 0} | {path: node + 1 for node, path in enumerate(self.paths)}
    return np.array([slots[path[:-1]] for path in self.paths], np.int32)

  @functools.cached_property
  def ranks_m(self) -> np.ndarray:
    return np.array([path[-1] for path in self.paths], np.int32)

  @functools.cached_property
  def depths_t(self) -> np.ndarray:
    return np.array([0, *map(len, self.paths)], np.int32)

  @functools.cached_property
  def ancestors_tt(self) -> np.ndarray:
    sees_tt = np.eye(self.num_nodes + 1, dtype=bool)
    for node, parent in enumerate(self.parents_m):
      sees_tt[node + 1] |= sees_tt[parent]
    return sees_tt

  @functools.cached_property
  def expanded(self) -> tuple[tuple[int, ...], ...]:
    """The slots that have children, level by level; a level is drafted from in one pass."""
    slots = sorted(set(self.parents_m.tolist()))
    return tuple(tuple(slot for slot in slots if self.depths_t[slot] == level)
                 for level in range(self.depth))

  @property
  def num_fed(self) -> int:
    """Drafted tokens that the draft is fed: those that have children."""
    return sum(map(len, self.expanded[1:]))

  @property
  def is_chain(self) -> bool:
    return self.parents_m.tolist() == list(range(self.num_nodes))

  def branches(self, batch: int, with_laws: bool) -> structs.Branches:
    """The same for every row; `with_laws`: children are drawn from laws, stored as `expanded`."""
    laws_t = np.zeros(self.num_nodes + 1, np.int32)
    laws_t[np.concatenate(self.expanded)] = np.arange(sum(map(len, self.expanded)))
    rows = lambda array: jnp.broadcast_to(jnp.asarray(array), (batch, *array.shape))
    return structs.Branches(
        rows(self.parents_m), rows(self.ranks_m), rows(self.depths_t), rows(self.ancestors_tt),
        rows(laws_t) if with_laws else None, depth=self.depth, width=self.width)


def chain(length: int) -> Tree:
  """The tree of width one."""
  if length < 1:
    raise ValueError(f'a chain has {length} tokens; it must have at least 1')
  return Tree(tuple((0,) * level for level in range(1, length + 1)))


def by_digits(table: str) -> Tree:
  """A tree whose paths are written as digits, a rank each: `'0 1 00'`."""
  return Tree(tuple(tuple(map(int, path)) for path in table.split()))


# Li et al. 2024 (EAGLE, arXiv 2401.15077), the tree of their released code.
EAGLE1 = by_digits("""
    0 1 2 3
    00 01 02 10 11 20 21 30
    000 001 002 010 011 020 021 100
    0000 0001 0002
    00000 00001""")

# Cai et al. 2024 (Medusa, arXiv 2401.10774), their code's mc_sim_7b_63, by levels.
MEDUSA = by_digits("""
    0 1 2 3 4 5 6 7 8 9
    00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 15 16 20 21 22 30 31 40 50 60 70 80 90
    000 001 002 003 004 005 006 007 008 009 010 011 012 020 021 030 040 050 060 070 100 101 200
    0000 0001""")


@dataclasses.dataclass(frozen=True)
class Dynamic:
  """A tree that follows the draft's confidence (Li et al. 2024, EAGLE-2, arXiv 2406.16858).

  A node's value is the product of the draft's probabilities along its path. Each level's
  `top_k` best nodes get `top_k` children each; of all these, the `num_nodes` best are verified.

  Attributes:
    top_k: nodes expanded a level, and children of each.
    depth: levels; the paper's 6 is `depth = 5` in its code, which doesn't count the first.
    num_nodes: drafted tokens that are verified, the root not counted.
  """
  top_k: int = 10
  depth: int = 6
  num_nodes: int = 60

  def __post_init__(self):
    for name in ('top_k', 'depth', 'num_nodes'):
      if getattr(self, name) < 1:
        raise ValueError(f'dynamic tree: {name} is {getattr(self, name)}; it must be at least 1')
    if self.num_nodes > self.pool_size:
      raise ValueError(
          f'dynamic tree: num_nodes is {self.num_nodes}, but top_k {self.top_k} and depth '
          f'{self.depth} draft only {self.pool_size} tokens to choose from')
    if self.num_nodes < self.depth:
      raise ValueError(f'dynamic tree: num_nodes is {self.num_nodes}, too few for a path of depth '
                       f'{self.depth}; it must be at least the depth')

  @property
  def width(self) -> int:
    """The most children that a node can have."""
    return min(self.top_k, self.num_nodes)

  @property
  def pool_size(self) -> int:
    """Drafted tokens, of which `num_nodes` are verified."""
    return self.top_k + (self.depth - 1) * self.top_k ** 2

  @property
  def num_fed(self) -> int:
    """Drafted tokens that the draft is fed."""
    return self.top_k * (self.depth - 1)


def grown(parents_bm: jax.Array, ranks_bm: jax.Array, *, depth: int,
          width: int) -> structs.Branches:
  """Branches of trees that differ from row to row, from their parents alone.

  Each slot points at its parent, the root at itself. In every round a slot sees what the slot
  that it points at sees, and points where that one points: paths double, so that few rounds do.
  """
  pointer_bt = jnp.pad(parents_bm, ((0, 0), (1, 0)))
  b, t = pointer_bt.shape
  sees_btt = jnp.broadcast_to(jnp.eye(t, dtype=bool), (b, t, t))
  for _ in range(depth.bit_length()):
    sees_btt = sees_btt | jnp.take_along_axis(sees_btt, pointer_bt[..., None], axis=1)
    pointer_bt = jnp.take_along_axis(pointer_bt, pointer_bt, axis=1)
  depths_bt = jnp.sum(sees_btt, axis=-1, dtype=jnp.int32) - 1
  return structs.Branches(parents_bm, ranks_bm, depths_bt, sees_btt, depth=depth, width=width)


def best_children(logits_btv: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k most probable tokens after each one: log-probabilities and ids, `[b, t, k]`.

  At temperature 1, and in float32: half precision ties at 0 and could leave a child more
  probable than its parent. No sum of exponentials is below its largest term, so no result is
  positive.
  """
  if k > logits_btv.shape[-1]:
    raise ValueError(f'a tree gives a node {k} children, but there are only '
                     f'{logits_btv.shape[-1]} tokens to choose from')
  logits_btv = logits_btv.astype(jnp.float32)
  best_btk, tokens_btk = jax.lax.top_k(logits_btv, k)
  total_bt1 = jax.nn.logsumexp(logits_btv, axis=-1, keepdims=True)
  return jnp.minimum(best_btk - total_bt1, 0.0), tokens_btk


def best_nodes(tree: Dynamic, tokens_bp: jax.Array, scores_bp: jax.Array, parents_bp: jax.Array
               ) -> tuple[jax.Array, structs.Branches]:
  """Keeps the best of a pool of candidates, level by level as they were drafted.

  Ties go to the earlier candidate, as `lax.top_k` sees to: a node is never more probable than
  its parent or its elder sibling, so neither is left out where it is kept.

  Args:
    tokens_bp: candidates, the first level's before the second's and so on, siblings by rank.
    scores_bp: summed log-probabilities along their paths.
    parents_bp: 0 for children of the root, else 1 + the parent's place in the pool.
  """
  k = tree.top_k
  chosen_bm = jnp.sort(jax.lax.top_k(scores_bp, tree.num_nodes)[1], axis=1)
  parents_bm = along(parents_bp, chosen_bm)
  is_parent_bmm = parents_bm[:, :, None] == chosen_bm[:, None, :] + 1
  slot_m = jnp.arange(1, tree.num_nodes + 1)
  slots_bm = jnp.sum(jnp.where(is_parent_bmm, slot_m, 0), axis=-1, dtype=jnp.int32)
  branches = grown(slots_bm, chosen_bm % k, depth=tree.depth, width=tree.width)
  scores_bm = along(scores_bp, chosen_bm)
  above_bm = along(jnp.pad(scores_bm, ((0, 0), (1, 0))), slots_bm)
  own_bm = jnp.where(scores_bm > -jnp.inf, scores_bm - above_bm, -jnp.inf)
  return along(tokens_bp, chosen_bm), branches.replace(draft_log_probs_bm=own_bm)


def mask(length_b: jax.Array, sees_btu: jax.Array, slots: int) -> jax.Array:
  """`mask_bts` of t tokens that see each row's first `length_b` slots, and then as told.

  `sees_btu` is about the u slots from `length_b` on; nothing is seen behind them.
  """
  b, t, _ = sees_btu.shape
  committed_bts = jnp.broadcast_to(
      jnp.arange(slots)[None, None] < length_b[:, None, None], (b, t, slots))
  write = lambda mask_ts, sees_tu, length: jax.lax.dynamic_update_slice(
      mask_ts, sees_tu, (0, length))
  if b == 1:  # a plain slice update; the batched one lowers to a scatter
    return write(committed_bts[0], sees_btu[0], length_b[0])[None]
  return jax.vmap(write)(committed_bts, sees_btu, length_b)


def along(array: jax.Array, path_bt: jax.Array) -> jax.Array:
  """Picks the slots of each row's path: `[b, t, ...]` to `[b, path, ...]`."""
  index = path_bt.reshape(*path_bt.shape, *(1,) * (array.ndim - 2))
  return jnp.take_along_axis(array, index, axis=1)
