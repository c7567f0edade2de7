"""Feature-level drafts in decoding: bound to their target, and drafting a chain.

Between cycles a row has n committed tokens, the last of which, the root, the target has not
read yet. So n - 1 features of the target are known, and as many pairs (feature t, token t + 1);
the last pair holds the root and predicts the first token to be drafted. A drafted token makes a
further pair with the draft's own output in place of a feature. Those pairs are forgotten when
the cycle ends: `commit` keeps the features that the verification gave, and the next proposal
begins by reading the new pairs from them, so that no error of the draft lasts.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib
from specdistill_jax.drafters import chains
from specdistill_jax.drafters import feature_config


@struct.dataclass
class Bound:
  """A feature-level draft and the target's embedding and head, which it shares.

  Attributes:
    module: the draft's network, a pytree of its own parameters.
    ends: the target without its layers (`Decoder.without_layers`).
  """
  module: Any
  ends: Any

  def init_cache(self, batch: int, num_slots: int) -> Any:
    """An empty cache, a slot for each pair; it advances and rolls back like a target's."""
    return self.module.init_cache(batch, num_slots)

  def inputs(self, target_output: structs.TargetOutput) -> jax.Array:
    """What is carried beside the next token at verified positions, `[b, t, d]`."""
    return self.module.inputs(target_output.features)

  def read(self, tokens_bt, carried_btd, positions_bt, mask_bts, cache):
    """Feeds pairs.

    Args:
      tokens_bt: the token of each pair, a place after its feature.
      carried_btd: the target's features (`inputs`), or what a former call put out.
      positions_bt: of the features; slots of the cache are pairs.
      mask_bts: as in `structs.TargetFn`.

    Returns:
      What the head reads for what follows each token, what is carried beside a token drafted
      there, both `[b, t, d]`, and the cache.
    """
    embedded_btd = embedded(self.module, self.ends, tokens_bt, carried_btd, positions_bt)
    return self.module(embedded_btd, carried_btd, positions_bt, mask_bts, cache)

  def logits(self, read_btd) -> jax.Array:
    """Next-token logits over the target's vocabulary; -inf where the draft can't go."""
    return self.module.logits(read_btd, self.ends)


@struct.dataclass
class TeacherForced:
  """A draft that reads the true features of given rows: its law at every place, as in `Bound`.

  What is measured on given text (`structs.Supervision`) so has the face of a model.

  Attributes:
    module: the draft's network.
    target: the whole target.
  """
  module: Any
  target: Any

  def supervise(self, batch: structs.Batch, *, first: int = 0,
                dropout_key=None) -> structs.Supervision:
    """At place t what the pair of token t gives, as the target does from token t."""
    del dropout_key
    tokens_bt = batch.tokens_bt.at[:, 0].set(structs.PAD_ID)  # the first token has no pair
    output = self.target.capturing(self.module.captured).causal(batch.tokens_bt)
    carried_btd = self.module.inputs(output.features)
    carried_btd = jnp.pad(carried_btd, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    positions_bt, mask_bts = feature_config.causal(tokens_bt)
    mask_bts = mask_bts & ((positions_bt[:, None, :] > 0) | (positions_bt[:, :, None] == 0))
    before_bt = positions_bt - 1
    embedded_btd = embedded(self.module, self.target, tokens_bt, carried_btd, before_bt)
    read_btd, *_ = self.module(embedded_btd, carried_btd, jnp.maximum(before_bt, 0), mask_bts)
    labels_bt, mask_bt = structs.labels_and_mask(batch.tokens_bt, batch.loss_mask_bt)
    return structs.Supervision(read_btd[:, first:], labels_bt[:, first:], mask_bt[:, first:])

  def logits(self, read_btd) -> jax.Array:
    return self.module.logits(read_btd, self.target)


def embedded(module, target, tokens_bt, carried_btd, positions_bt):
  """The embedding of each pair's token: the target's, unless the draft has one of its own."""
  if hasattr(module, 'embedded'):
    return module.embedded(tokens_bt, carried_btd)
  return target.embed(tokens_bt, positions_bt + 1)


@struct.dataclass
class DraftState:
  """A chain drafter's state: pairs read from true features, and features not yet read.

  Attributes:
    cache: of the draft; `length_b` pairs are read.
    pending_bgd: features of the pairs from there on, `[b, gamma + 1, d]`, then filler.
  """
  cache: Any
  pending_bgd: jax.Array


@struct.dataclass
class FeatureDrafter:
  """Drafts a chain with a feature-level draft: a `structs.Drafter`.

  Attributes:
    draft: a `tree.TreeDraft`, such as `Bound`.
    gamma: tokens drafted a cycle.
    sampling: the law drafted from, as in `lm.LMDrafter`.
    min_confidence: where a draft ends early, as in `chains.draft`; 0 always drafts gamma.
  """
  draft: Any
  gamma: int = struct.field(pytree_node=False)
  sampling: sampling_lib.Sampling = struct.field(pytree_node=False)
  min_confidence: float = struct.field(pytree_node=False, default=0.0)

  def prefill(self, prompts_bt, prompt_lengths_b, target_output, slots):
    """Reads all pairs of the prompts but each one's last, which the first proposal reads.

    A prompt of one token has no pair: the first proposal reads zeros and padding instead.
    """
    b, t = prompts_bt.shape
    carried_btd = self.draft.inputs(target_output)
    cache = self.draft.init_cache(b, slots)
    positions_bt, mask_bts = state_lib.block_positions(cache.length_b, t, slots)
    *_, cache = self.draft.read(feature_config.shift_left(prompts_bt, 1), carried_btd,
                                positions_bt, mask_bts, cache)
    last_b11 = (prompt_lengths_b - 2)[:, None, None]
    last_b1d = jnp.take_along_axis(carried_btd, jnp.maximum(last_b11, 0), axis=1)
    pending_bgd = jnp.pad(jnp.where(last_b11 < 0, 0, last_b1d), ((0, 0), (0, self.gamma), (0, 0)))
    return DraftState(cache.rollback(jnp.maximum(prompt_lengths_b - 2, 0)), pending_bgd)

  def propose(self, state, key_b):
    key_gb, slots = sampling_lib.split_rows(key_b, self.gamma), state.tokens_bs.shape[1]
    logits_bv, carried_b1d, cache, read_b = self._read_verified(state)
    feed = lambda token_b, carried: self._feed(token_b, *carried, slots)
    chain = chains.draft(feed, key_gb, logits_bv, (carried_b1d, cache), sampling=self.sampling,
                         min_confidence=self.min_confidence, done_b=state.done_b)
    _, cache = chain.carried
    # Drafted pairs lie behind this length: what was read from true features stays.
    kept = state.drafter_state.replace(cache=cache.rollback(read_b))
    return structs.Proposal(
        tokens_bg=chain.tokens_bg, log_probs_bgv=chain.log_probs_bgv, drafter_state=kept,
        num_drafted_b=chain.num_drafted_b)

  def commit(self, state, proposal, verdict, target_output):
    """Keeps the features of the verified block, of which the next proposal reads what it needs.

    Without a target's output, as when proposals alone are timed, the old ones, which stand for
    those of the root's pair and behind.
    """
    del state, verdict
    if target_output is None:
      cache = proposal.drafter_state.cache
      return proposal.drafter_state.replace(
          cache=cache.rollback(jnp.maximum(cache.length_b - 1, 0)))
    return proposal.drafter_state.replace(pending_bgd=self.draft.inputs(target_output))

  def _read_verified(self, state):
    """Reads the pairs that came with the last verification, up to each row's root.

    Returns the logits behind the root, what the draft carries there, the cache, and its length.
    """
    cache, pending_bgd = state.drafter_state.cache, state.drafter_state.pending_bgd
    count, slots = pending_bgd.shape[1], state.tokens_bs.shape[1]
    positions_bt, mask_bts = state_lib.block_positions(cache.length_b, count, slots)
    tokens_bt = jnp.take_along_axis(
        state.tokens_bs, jnp.minimum(positions_bt + 1, slots - 1), axis=1)
    # The pair of the root is the last; finished rows, and one-token prompts, have none.
    last_b = jnp.clip(state.lengths_b - 2 - cache.length_b, 0, count - 1)
    read_btd, carried_btd, cache = self.draft.read(tokens_bt, pending_bgd, positions_bt, mask_bts,
                                                   cache)
    at_last = lambda x_btd: jnp.take_along_axis(x_btd, last_b[:, None, None], axis=1)
    logits_bv = self.draft.logits(at_last(read_btd))[:, 0]
    read_b = state.lengths_b - 1
    return (logits_bv, at_last(carried_btd), cache.rollback(jnp.maximum(read_b, 1)), read_b)

  def _feed(self, token_b, carried_b1d, cache, slots):
    """A drafted pair: logits `[b, v]` of the next token; what is carried on, and the cache."""
    positions_bt, mask_bts = state_lib.block_positions(cache.length_b, 1, slots)
    read_b1d, carried_b1d, cache = self.draft.read(token_b[:, None], carried_b1d, positions_bt,
                                                   mask_bts, cache)
    return self.draft.logits(read_b1d)[:, 0], (carried_b1d, cache)
