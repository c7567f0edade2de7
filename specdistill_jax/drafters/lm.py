"""A standalone language model as drafter: DistillSpec's setting.

Its cache may lag the committed tokens by one or two: after a full acceptance neither the last
drafted token nor the bonus token was ever fed. So each proposal begins by feeding two tokens
from wherever the cache ends, and reads the logits of the row's last real one; that costs one
slightly wider step instead of an additional one.
"""

from flax import struct
import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib

CATCH_UP = 2  # tokens fed by a proposal's first step


@struct.dataclass
class LMDrafter:
  """Drafts by sampling a small model autoregressively.

  Attributes:
    module: the draft model, layers unrolled; a `structs.Decodable` of the target's family.
    gamma: tokens drafted a cycle.
    sampling: the law drafted from. The target's own sampling for `sampled` drafts;
      temperature 0 for `greedy` ones, whose law is one-hot.
  """
  module: object
  gamma: int = struct.field(pytree_node=False)
  sampling: sampling_lib.Sampling = struct.field(pytree_node=False)

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
    last_b = state.lengths_b - 1
    index_bt = cache.length_b[:, None] + jnp.arange(CATCH_UP)[None]
    fed_bt = jnp.take_along_axis(state.tokens_bs, index_bt, axis=1)
    logits_bv, cache = self._feed(fed_bt, cache, last_b - cache.length_b, slots)
    cache = cache.rollback(state.lengths_b)  # a row that lagged by one fed a token too many
    tokens, log_probs = [], []
    for index in range(self.gamma):
      if index:
        logits_bv, cache = self._feed(tokens[-1][:, None], cache, 0, slots)
      log_probs.append(sampling_lib.warp(logits_bv, self.sampling))
      tokens.append(self._draw(key_gb[index], log_probs[-1]))
    return structs.Proposal(tokens_bg=jnp.stack(tokens, axis=1),
                            log_probs_bgv=jnp.stack(log_probs, axis=1), drafter_state=cache)

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

  def _draw(self, key_b: jax.Array, log_probs_bv: jax.Array) -> jax.Array:
    if self.sampling.is_greedy:
      return jnp.argmax(log_probs_bv, axis=-1).astype(jnp.int32)
    return sampling_lib.categorical(key_b, log_probs_bv)
