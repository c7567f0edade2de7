"""The shared nouns, and the shape legend that every name in the project follows.

An array's name ends in its axes, one letter each: `logits_btv` is `[b, t, v]`.

  b  row of the batch            n  query head           g  draft position
  t  position fed in this call   k  key/value head       m  tree node
  s  cached or buffered slot     h  head width           l  layer
  d  model width                 f  MLP width            v  vocabulary
  r  relative-position bucket    c  child of a node      e  tree node that has children
  w  several widths d, side by side

Probabilities are kept as natural logarithms in float32. In training the two models are
`student` and `teacher`, in decoding `drafter` and `target`.
"""

import dataclasses
from typing import Any, Protocol

from flax import struct
import jax
import jax.numpy as jnp

PAD_ID = 0
EOS_ID = 1


@dataclasses.dataclass(frozen=True)
class Widths:
  """The longest prompt and the longest completion in the data a batch comes from, in tokens.

  Static: an encoder-decoder reads and writes buffers of these sizes, not of a whole row's.
  """
  prompt: int
  completion: int


@struct.dataclass
class Batch:
  """Token rows as the trainer eats them, right-padded with `PAD_ID`.

  A row is a prompt followed by its completion (end token included). `loss_mask_bt[:, t]`
  is 1 where predicting `tokens_bt[:, t]` is to be learnt; it is stored, never inferred
  from the token id, so that an end token that doubles as padding is still learnt.

  Attributes:
    tokens_bt: int32 token ids.
    loss_mask_bt: float32, 1 on tokens to be predicted, 0 elsewhere.
    prompt_lengths_b: int32, tokens of the prompt.
    lengths_b: int32, tokens of prompt and completion together.
    widths: bounds on prompts and completions; None: none tighter than the row is known.
  """
  tokens_bt: jax.Array
  loss_mask_bt: jax.Array
  prompt_lengths_b: jax.Array
  lengths_b: jax.Array
  widths: Widths | None = struct.field(pytree_node=False, default=None)


def labels_and_mask(tokens_bt, loss_mask_bt):
  """Labels and mask moved onto the position that predicts them.

  The logits of position t predict token t + 1. The last position predicts nothing, and the
  first token is never predicted, whatever its mask.
  """
  labels_bt = jnp.roll(tokens_bt, -1, axis=1)
  mask_bt = jnp.roll(loss_mask_bt, -1, axis=1).at[:, -1].set(0)
  return labels_bt, mask_bt.astype(jnp.float32)


@struct.dataclass
class Supervision:
  """What a model makes of a `Batch` in training: features, and what they are to predict.

  Where a position stands in the row is the model's affair; models of one family agree on it.

  Attributes:
    features_btd: what the model's head reads, `model.logits(features_btd)`.
    labels_bt: int32, the token that each position predicts.
    mask_bt: float32, 1 where that is to be learnt.
  """
  features_btd: jax.Array
  labels_bt: jax.Array
  mask_bt: jax.Array


@struct.dataclass
class DraftStep:
  """What a feature-level draft makes of a `Batch` in training, at one of its drafted steps.

  Place t stands for drafting that begins with the target's feature t.

  Attributes:
    read_btd: what the draft's head reads.
    predicted_btd: what the next step carries, and a feature loss holds to `taught_btd`.
    taught_btd: the target's feature of the token that this step reads: its head's law there is
      what the draft's is compared with. Without gradient. At place t that of the next step at
      t - 1 (`chunked.Sliding`).
    mask_bt: float32, 1 where this is to be learnt.
  """
  read_btd: jax.Array
  predicted_btd: jax.Array
  taught_btd: jax.Array
  mask_bt: jax.Array


@struct.dataclass
class TargetOutput:
  """What one call of a model returns.

  Attributes:
    logits_btv: next-token logits, float32, before any temperature.
    features: hidden features by name; `features['final_btd']` is what the head reads, and
      `features['captured_btw']`, of a model that captures some, its layers' inputs.
    cache: the cache after the call, or None when there was none.
  """
  logits_btv: jax.Array
  features: dict[str, jax.Array]
  cache: Any


@struct.dataclass
class Start:
  """Where a model begins to decode, given the user's prompts.

  A decoder is fed the prompts themselves. An encoder-decoder reads them once, here, and its
  decoder begins with a start token.

  Attributes:
    tokens_bt: int32, the decoder's first tokens, right-padded.
    lengths_b: int32, how many of them are real.
    memory: what the decoder looks at all along and never changes, or None.
  """
  tokens_bt: jax.Array
  lengths_b: jax.Array
  memory: Any = None


class TargetFn(Protocol):
  """A model with its parameters bound: the one seam between algorithms and networks.

  `mask_bts[b, t, s]` says whether the token fed at `t` sees slot `s`; without a cache the
  slots are the fed positions themselves. A call writes its `t` tokens to the cache at each
  row's own `cache.length_b` and advances `length_b` by `t`; going back is
  `cache.rollback(length_b)`. Of a tree just written from slot `offset_b` on,
  `cache.keep_path(offset_b, path_bt)` moves the slots of one path, counted from there, to its
  beginning. `positions_bt` are those of the tokens in their texts: in a tree, siblings share one.
  """

  def __call__(self, tokens_bt: jax.Array, positions_bt: jax.Array,
               mask_bts: jax.Array, cache: Any) -> TargetOutput:
    ...


class Decodable(TargetFn, Protocol):
  """A `TargetFn` that can begin: what the decoding loops need to know of a model.

  The memory travels in the cache, so that a loop's state is all that changes hands between
  prefill and decoding, and parameters are never copied.
  """

  def start(self, prompts_bt: jax.Array, prompt_lengths_b: jax.Array) -> Start:
    ...

  def init_cache(self, batch: int, num_slots: int, memory: Any = None) -> Any:
    ...


@struct.dataclass
class Branches:
  """How the nodes of a drafted tree hang together.

  Slot 0 of the block that the target reads is the root, the last committed token; slot i + 1
  is node i. A node's parent is stored before it; siblings have the ranks 0, 1, and so on, in
  the order in which they are judged, wherever they are stored.

  Attributes:
    parents_bm: int32, the slot of each node's parent.
    ranks_bm: int32, each node's place among its siblings.
    depths_bt: int32, edges from the root to each slot.
    ancestors_btt: bool, whether the second slot is the first one or an ancestor of it.
    laws_bt: int32, which of the proposal's laws a slot's children were drawn from; anything
      where it has none. None where the proposal has no laws.
    draft_log_probs_bm: float32, what the draft thinks of each node after its parent. Nothing is
      judged by it, so that a loop doesn't compute it: it is for who looks at trees. None: not told.
    depth: the deepest level.
    width: the most children that a node has.
  """
  parents_bm: jax.Array
  ranks_bm: jax.Array
  depths_bt: jax.Array
  ancestors_btt: jax.Array
  laws_bt: jax.Array | None = None
  draft_log_probs_bm: jax.Array | None = None
  depth: int = struct.field(pytree_node=False, default=1)
  width: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class Proposal:
  """A drafted block of tokens and the law they were drawn from.

  A chain, or with `branches` a tree, whose nodes then stand along g.

  Attributes:
    tokens_bg: int32 drafted tokens.
    log_probs_bgv: float32, the exact (already warped) log-probabilities that each token
      was drawn from; one-hot (0 and -inf) when the drafter is greedy. In a tree, `[b, e, v]`:
      the law that the children of a node were drawn from, in order and without replacement;
      None when the tree follows from the context, as when it holds the most probable tokens.
    drafter_state: the drafter's own state after drafting.
    num_drafted_b: int32, how many of a row's positions were drafted, 1 to g; what lies behind
      is filler. It may depend on drafted tokens, but whether position i is drafted must be
      settled before its token is drawn, or the judged tokens are biased. None: all of them.
  """
  tokens_bg: jax.Array
  log_probs_bgv: jax.Array | None
  drafter_state: Any
  num_drafted_b: jax.Array | None = None
  branches: Branches | None = None


@struct.dataclass
class Verdict:
  """What a rule makes of a proposal.

  Attributes:
    num_accepted_b: int32, drafted tokens kept, 0 to what the row drafted.
    next_token_b: int32, the correction token, or the bonus token when all were kept.
  """
  num_accepted_b: jax.Array
  next_token_b: jax.Array


@struct.dataclass
class DecodeStats:
  """Counts by row, so that sums come before ratios.

  Attributes:
    target_calls_b: int32, calls of the target after prefill while the row was unfinished.
    emitted_b: int32, new tokens, the end token included.
    drafted_b: int32, tokens drafted while the row was unfinished, all nodes of a tree.
    reached_bg: int32, times draft position g (a tree's level g + 1) was examined: everything
      before it was accepted, and its token lies within the row's end and budget.
    accepted_bg: int32, times it was accepted, likewise.
  """
  target_calls_b: jax.Array
  emitted_b: jax.Array
  drafted_b: jax.Array
  reached_bg: jax.Array
  accepted_bg: jax.Array


@struct.dataclass
class DecodeState:
  """The whole state of a decoding loop: fixed-size buffers, one row independent of another.

  The last committed token (the root) is in `tokens_bs` but not yet in the target's cache:
  `target_cache.length_b == lengths_b - 1` between cycles.

  Attributes:
    tokens_bs: int32 buffer of prompt and committed tokens, right-padded.
    lengths_b: int32, committed tokens, the prompt included.
    limits_b: int32, the length at which a row stops: prompt plus its budget of new tokens.
    done_b: bool, the row has emitted its end token or reached its limit.
    key_b: one typed PRNG key a row.
    target_cache: the target's cache.
    drafter_state: the drafter's state, None in autoregressive decoding.
    stats: counts.
  """
  tokens_bs: jax.Array
  lengths_b: jax.Array
  limits_b: jax.Array
  done_b: jax.Array
  key_b: jax.Array
  target_cache: Any
  drafter_state: Any
  stats: DecodeStats


class Drafter(Protocol):
  """What proposes. Implementations are pytrees of parameters with static settings.

  `prefill` gives the drafter's state after the user's prompts, for `slots` decoded positions
  (those of `state.tokens_bs`, a decoder's prompts included); `propose` drafts up to `gamma`
  tokens after each row's last committed token; `commit` gives the drafter's state on the accepted
  prefix, `state` already holding the new tokens.

  A drafter of trees has `num_nodes`, the tokens of a tree, and `gamma` is the tree's depth. What
  `commit` gets is the accepted path alone: a chain of its tokens, with the target's output at
  the root and at them.
  """
  gamma: int

  def prefill(self, prompts_bt: jax.Array, prompt_lengths_b: jax.Array,
              target_output: TargetOutput, slots: int) -> Any:
    ...

  def propose(self, state: DecodeState, key_b: jax.Array) -> Proposal:
    ...

  def commit(self, state: DecodeState, proposal: Proposal, verdict: Verdict,
             target_output: TargetOutput) -> Any:
    ...


class Rule(Protocol):
  """What judges a proposal, `target_log_probs_btv` being `[b, g + 1, v]` and warped.

  `lossless` says whether what is emitted follows the target's law. A rule that wants to judge
  by another law than the one sampled from has an attribute `law`, a `Sampling`: at temperature 0
  a one-hot law says nothing about the second best token.

  A rule that judges token by token (`judging.TokenRule`) can judge trees too.
  """
  lossless: bool

  def __call__(self, target_log_probs_btv: jax.Array, proposal: Proposal,
               key_b: jax.Array) -> Verdict:
    ...


@struct.dataclass
class Generation:
  """New tokens of a batch of prompts.

  Attributes:
    tokens: int32 `[b, s]`, the new tokens only, padded with `PAD_ID`.
    lengths: int32 `[b]`, new tokens of each row, the end token included.
    stats: counts by row.
  """
  tokens: jax.Array
  lengths: jax.Array
  stats: DecodeStats
