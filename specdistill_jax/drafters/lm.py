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

LARGEST_LAG = 2  # tokens committed and not yet fed


@struct.dataclass
class LMDrafter:
  """Drafts by sampling a small model autoregressively.

  Attributes:
    module: the draft model, layers unrolled; a `structs.Decodable` of the target's family.
    gamma: tokens drafted a cycle.
    sampling: the law drafted from. The target's own sampling for `sampled` drafts;
      temperature 0 for `greedy` ones, whose law is one-hot.
    min_confidence: a row's draft ends with the first token whose law gave no token as much
      probability, at temperature 1; 0 always drafts gamma. The token itself is still drafted,
      its law being paid for. The law alone decides, before its token is drawn: a draft that
      dropped tokens for what they turned out to be would bias what is judged.
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
    if self.min_confidence:
      return self._while_confident(state, key_gb, logits_bv, cache)
    tokens, log_probs = [], []
    for index in range(self.gamma):
      if index:
        logits_bv, cache = self._feed(tokens[-1][:, None], cache, 0, slots)
      token_b, log_probs_bv = self._draw(key_gb[index], logits_bv)
      tokens.append(token_b)
      log_probs.append(log_probs_bv)
    return structs.Proposal(tokens_bg=jnp.stack(tokens, axis=1),
                            log_probs_bgv=jnp.stack(log_probs, axis=1), drafter_state=cache)

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

  def _while_confident(self, state, key_gb, logits_bv, cache):
    """Drafts until no unfinished row goes on: steps that no row needs are not run.

    A row that has stopped is fed on with the others; `commit` forgets what it didn't keep.
    """
    b, slots = state.tokens_bs.shape
    token_b, log_probs_bv = self._draw(key_gb[0], logits_bv)
    tokens_gb = jnp.zeros((self.gamma, b), jnp.int32).at[0].set(token_b)
    log_probs_gbv = jnp.zeros((self.gamma, *log_probs_bv.shape)).at[0].set(log_probs_bv)
    goes_on_b = ~state.done_b & self._is_confident(logits_bv)

    def body(carry):
      index, goes_on_b, drafted_b, tokens_gb, log_probs_gbv, cache = carry
      logits_bv, cache = self._feed(tokens_gb[index - 1][:, None], cache, 0, slots)
      token_b, log_probs_bv = self._draw(key_gb[index], logits_bv)
      return (index + 1, goes_on_b & self._is_confident(logits_bv),
              drafted_b + goes_on_b.astype(jnp.int32), tokens_gb.at[index].set(token_b),
              log_probs_gbv.at[index].set(log_probs_bv), cache)

    _, _, drafted_b, tokens_gb, log_probs_gbv, cache = jax.lax.while_loop(
        lambda carry: (carry[0] < self.gamma) & jnp.any(carry[1]), body,
        (jnp.int32(1), goes_on_b, jnp.ones((b,), jnp.int32), tokens_gb, log_probs_gbv, cache))
    return structs.Proposal(tokens_bg=tokens_gb.T, log_probs_bgv=jnp.swapaxes(
        log_probs_gbv, 0, 1), drafter_state=cache, num_drafted_b=drafted_b)

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

  def _is_confident(self, logits_bv: jax.Array) -> jax.Array:
    return jnp.max(jax.nn.softmax(logits_bv, axis=-1), axis=-1) >= self.min_confidence

  def _draw(self, key_b: jax.Array, logits_bv: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A token a row, and the law that it was drawn from."""
    log_probs_bv = sampling_lib.warp(logits_bv, self.sampling)
    if self.sampling.is_greedy:
      return jnp.argmax(log_probs_bv, axis=-1).astype(jnp.int32), log_probs_bv
    return sampling_lib.categorical(key_b, log_probs_bv), log_probs_bv
