"""A standalone language model as drafter: DistillSpec's setting.

Its cache may lag the committed tokens by one or two: after a full acceptance neither the last
drafted token nor the bonus token was ever fed. A proposal begins by catching up, in the way that
is cheaper on the device.
"""

from flax import struct
import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib
from specdistill_jax.drafters import chains

LARGEST_LAG = 2  # tokens committed and not yet fed


@struct.dataclass
class LMDrafter:
  """Drafts by sampling a small model autoregressively.

  Attributes:
    module: the draft model, layers unrolled; a `structs.Decodable` of the target's family.
    gamma: tokens drafted a cycle.
    sampling: the law drafted from. The target's own sampling for `sampled` drafts;
      temperature 0 for `greedy` ones, whose law is one-hot.
    min_confidence: where a draft ends early, as in `chains.draft`; 0 always drafts gamma.
  """
  module: object
  gamma: int = struct.field(pytree_node=False)
  sampling: sampling_lib.Sampling = struct.field(pytree_node=False)
  min_confidence: float = struct.field(pytree_node=False, default=0.0)

  def prefill(self, prompts_bt, prompt_lengths_b, target_output, slots):
    """Reads the prompts, with its own encoder if it has one; the target's features don't help."""
    del target_output
    start = self.module.start(prompts_bt, prompt_lengths_b)
    cache = self.module.init_cache(prompts_bt.shape[0], slots, start.memory)
    return state_lib.prefill_cache(
        self.module, cache, start.tokens_bt, start.lengths_b, slots).cache

  def propose(self, state, key_b):
    slots = state.tokens_bs.shape[1]
    cache = state.drafter_state
    key_gb = sampling_lib.split_rows(key_b, self.gamma)
    logits_bv, cache = jax.lax.platform_dependent(
        state.tokens_bs, state.lengths_b, cache, cpu=self._catch_up_singly,
        default=self._catch_up_together)
    chain = chains.draft(
        lambda token_b, cache: self._feed(token_b[:, None], cache, 0, slots), key_gb, logits_bv,
        cache, sampling=self.sampling, min_confidence=self.min_confidence, done_b=state.done_b)
    return structs.Proposal(
        tokens_bg=chain.tokens_bg, log_probs_bgv=chain.log_probs_bgv, drafter_state=chain.carried,
        num_drafted_b=chain.num_drafted_b)

  def _catch_up_together(self, tokens_bs, lengths_b, cache):
    """Feeds two tokens from where the cache ends, and reads the logits of each row's last.

    On accelerators a step of two tokens costs hardly more than one.
    """
    index_bt = cache.length_b[:, None] + jnp.arange(LARGEST_LAG)[None]
    fed_bt = jnp.take_along_axis(tokens_bs, index_bt, axis=1)
    logits_bv, cache = self._feed(fed_bt, cache, lengths_b - 1 - cache.length_b,
                                  tokens_bs.shape[1])
    return logits_bv, cache.rollback(lengths_b)  # some rows fed a token too many

  def _catch_up_singly(self, tokens_bs, lengths_b, cache):
    """Feeds a token more, without its logits, when a row lags; then each row's last.

    On CPUs a step of two tokens costs almost two, and this one leaves out the head.
    """
    last_b, slots = lengths_b - 1, tokens_bs.shape[1]
    token_at = lambda index_b: jnp.take_along_axis(tokens_bs, index_b[:, None], axis=1)
    catch_up = lambda cache: self._feed(
        token_at(cache.length_b), cache, 0, slots)[1].rollback(last_b)
    cache = jax.lax.cond(jnp.any(cache.length_b < last_b), catch_up, lambda cache: cache, cache)
    return self._feed(token_at(last_b), cache, 0, slots)

  def commit(self, state, proposal, verdict, target_output):
    """Goes back to the tokens that are both fed and committed, all but the last one."""
    del verdict, target_output
    cache = proposal.drafter_state
    return cache.rollback(jnp.minimum(cache.length_b, state.lengths_b - 1))

  def _feed(self, tokens_bt, cache, read_b, slots):
    """Feeds a block at each row's length; logits `[b, v]` at position `read_b` of the block."""
    positions_bt, mask_bts = state_lib.block_positions(
        cache.length_b, tokens_bt.shape[1], slots)
    output = self.module(tokens_bt, positions_bt, mask_bts, cache)
    features_btd = output.features['final_btd']
    if tokens_bt.shape[1] > 1:  # the head is the dearest layer of a small draft: read once
      features_btd = jnp.take_along_axis(features_btd, read_b[:, None, None], axis=1)
    return self.module.logits(features_btd)[:, 0], output.cache
