"""Plain decoding, a token per target call: the baseline, and the source of rollouts.

`prefill` and `decode` are separate so that each can be jitted and timed alone.
"""

import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib


def prefill(target: structs.Decodable, prompts_bt: jax.Array, prompt_lengths_b: jax.Array,
            key: jax.Array, *, max_new_tokens: int) -> structs.DecodeState:
  """Reads the prompts."""
  room = state_lib.num_slots(0, max_new_tokens, 0)
  start, output = state_lib.read_prompts(target, prompts_bt, prompt_lengths_b, room)
  return state_lib.init(start.tokens_bt, start.lengths_b, key, output.cache,
                        max_new_tokens=max_new_tokens, gamma=0, room=room)


def step(target_fn: structs.TargetFn, state: structs.DecodeState,
         sampling: sampling_lib.Sampling,
         eos_id: int | tuple[int, ...]) -> structs.DecodeState:
  """One target call and one token for every unfinished row."""
  slots = state.tokens_bs.shape[1]
  next_key_b, draw_key_b = sampling_lib.split_rows(state.key_b, 2)
  positions_bt, mask_bts = state_lib.block_positions(state.lengths_b - 1, 1, slots)
  output = target_fn(state_lib.last_tokens(state)[:, None], positions_bt, mask_bts,
                     state.target_cache)
  log_probs_bv = sampling_lib.warp(output.logits_btv[:, 0], sampling)
  token_b = sampling_lib.draw(draw_key_b, log_probs_bv, sampling.is_greedy)
  state, _ = state_lib.append(state, token_b[:, None], jnp.ones_like(token_b), eos_id)
  return state.replace(key_b=next_key_b,
                       target_cache=output.cache.rollback(state.lengths_b - 1))


def decode(target_fn: structs.TargetFn, state: structs.DecodeState, *,
           sampling: sampling_lib.Sampling,
           eos_id: int | tuple[int, ...] = structs.EOS_ID) -> structs.DecodeState:
  """Runs until every row is done: one `lax.while_loop`, no host round trip."""
  return state_lib.run(lambda state: step(target_fn, state, sampling, eos_id), state)


def generate(target: structs.Decodable, prompts_bt: jax.Array, prompt_lengths_b: jax.Array,
             key: jax.Array, *, sampling: sampling_lib.Sampling, max_new_tokens: int,
             eos_id: int | tuple[int, ...] = structs.EOS_ID) -> structs.DecodeState:
  """`prefill` then `decode`; traceable, for use inside a larger jitted function."""
  state = prefill(target, prompts_bt, prompt_lengths_b, key, max_new_tokens=max_new_tokens)
  return decode(target, state, sampling=sampling, eos_id=eos_id)
