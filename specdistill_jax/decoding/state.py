"""What the autoregressive and the speculative loops share: the buffers and their bookkeeping."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import sampling


def num_slots(prompt_width: int, max_new_tokens: int, num_drafted: int) -> int:
  """Slots that buffers and caches need: the longest row and the longest write past its end.

  `prompt_width` is that of the model's first tokens (`structs.Start`). A row that has finished
  keeps taking part in the batch's calls, so a write of root and drafted tokens (2 for a drafter
  that catches up) can start at the longest length.
  """
  return prompt_width + max_new_tokens + max(num_drafted + 1, 2)


def num_drafted(drafter: structs.Drafter) -> int:
  """Tokens that one cycle drafts, at most: the nodes of a tree, or the length of a chain."""
  return getattr(drafter, 'num_nodes', drafter.gamma)


def init(prompts_bt: jax.Array, prompt_lengths_b: jax.Array, key: jax.Array, target_cache,
         *, max_new_tokens: int, gamma: int, room: int) -> structs.DecodeState:
  """The state before the first cycle; `target_cache` holds all but each prompt's last token.

  Args:
    gamma: drafted tokens that a cycle can keep, at most.
    room: slots beyond the prompts.
  """
  b, t = prompts_bt.shape
  real_bt = jnp.arange(t)[None] < prompt_lengths_b[:, None]
  tokens_bs = jnp.pad(jnp.where(real_bt, prompts_bt, structs.PAD_ID), ((0, 0), (0, room)),
                      constant_values=structs.PAD_ID)
  zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
  stats = structs.DecodeStats(target_calls_b=zeros(b), emitted_b=zeros(b),
                              drafted_b=zeros(b), reached_bg=zeros(b, gamma),
                              accepted_bg=zeros(b, gamma))
  return structs.DecodeState(
      tokens_bs=tokens_bs.astype(jnp.int32), lengths_b=prompt_lengths_b.astype(jnp.int32),
      limits_b=(prompt_lengths_b + max_new_tokens).astype(jnp.int32),
      done_b=jnp.zeros((b,), bool), key_b=sampling.row_keys(key, b),
      target_cache=target_cache, drafter_state=None, stats=stats)


def prefill_cache(target_fn: structs.TargetFn, cache, prompts_bt: jax.Array,
                  prompt_lengths_b: jax.Array, slots: int) -> structs.TargetOutput:
  """Feeds whole prompts, then forgets padding and each prompt's last token.

  The last token is fed again by the first cycle, which wants its logits; here they go unused,
  and so does the head for every prompt position (the compiler drops it).
  """
  b, t = prompts_bt.shape
  positions_bt = jnp.broadcast_to(jnp.arange(t), (b, t))
  mask_bts = jnp.arange(slots)[None, None, :] <= positions_bt[:, :, None]
  output = target_fn(prompts_bt, positions_bt, mask_bts, cache)
  return output.replace(cache=output.cache.rollback(prompt_lengths_b - 1))


def read_prompts(model: structs.Decodable, prompts_bt: jax.Array, prompt_lengths_b: jax.Array,
                 room: int) -> tuple[structs.Start, structs.TargetOutput]:
  """Encodes prompts where the model does that, and fills a cache with what it begins with.

  Args:
    room: slots beyond the model's first tokens.
  """
  start = model.start(prompts_bt, prompt_lengths_b)
  b, t = start.tokens_bt.shape
  cache = model.init_cache(b, t + room, start.memory)
  return start, prefill_cache(model, cache, start.tokens_bt, start.lengths_b, t + room)


def block_positions(length_b: jax.Array, num_tokens: int, slots: int):
  """Positions and mask of a causal block fed at each row's own length.

  Returns `positions_bt` and `mask_bts`: the query at position i sees slots 0 to i.
  """
  positions_bt = length_b[:, None] + jnp.arange(num_tokens)[None]
  return positions_bt, jnp.arange(slots)[None, None, :] <= positions_bt[:, :, None]


def last_tokens(state: structs.DecodeState) -> jax.Array:
  """The root of each row: its last committed token, int32 `[b]`."""
  return jnp.take_along_axis(state.tokens_bs, state.lengths_b[:, None] - 1, axis=1)[:, 0]


def new_tokens(state: structs.DecodeState, max_new_tokens: int) -> jax.Array:
  """What was decoded after each row's first tokens, int32 `[b, max_new_tokens]`, padded."""
  begin_b = state.lengths_b - state.stats.emitted_b
  index_bs = begin_b[:, None] + jnp.arange(max_new_tokens)[None]
  return jnp.take_along_axis(state.tokens_bs, index_bs, axis=1)


def end_ids(target_fn: structs.TargetFn) -> int | tuple[int, ...]:
  """The ids that end a row: the model's own `eos_id`, or the project's where it has none."""
  return getattr(target_fn, 'eos_id', structs.EOS_ID)


def run(step: Callable, state: structs.DecodeState) -> structs.DecodeState:
  """Applies `step` until every row is done: one `lax.while_loop`, no host round trip."""
  step, carry, restore = _without_single_row(step, state)
  return restore(jax.lax.while_loop(lambda carry: ~jnp.all(carry.done_b), step, carry))


def repeat(step: Callable, state: structs.DecodeState, num_steps: int) -> structs.DecodeState:
  """Applies `step` that many times, as `run` would."""
  step, carry, restore = _without_single_row(step, state)
  return restore(jax.lax.fori_loop(0, num_steps, lambda _, carry: step(carry), carry))


def _without_single_row(step, state):
  """Step, state and way back of a loop that carries a single row without its batch axis.

  XLA's CPU backend otherwise updates a cache twice a step, once to carry it and once for
  attention to read, and copies it for that.
  """
  if state.done_b.shape[0] > 1:
    return step, state, lambda state: state
  squeeze = lambda state: jax.tree.map(lambda x: x[0], state)
  expand = lambda state: jax.tree.map(lambda x: x[None], state)
  return lambda row: squeeze(step(expand(row))), squeeze(state), expand


def append(state: structs.DecodeState, block_bt: jax.Array, count_b: jax.Array,
           eos_id: int | tuple[int, ...]
           ) -> tuple[structs.DecodeState, jax.Array]:
  """Commits the first `count_b` tokens of each block, cut at the end token and the limit.

  Finished rows stay as they are. Counts the call and the tokens in `stats`. Returns the state
  and the number of tokens that were really committed, int32 `[b]`.
  """
  t = block_bt.shape[1]
  index_t = jnp.arange(t)[None]
  is_end_bt = jnp.isin(block_bt, jnp.asarray(eos_id, jnp.int32)) & (index_t < count_b[:, None])
  # Tokens up to and including the first end token.
  through_end_b = jnp.where(jnp.any(is_end_bt, axis=1), jnp.argmax(is_end_bt, axis=1) + 1, t)
  count_b = jnp.minimum(jnp.minimum(count_b, through_end_b), state.limits_b - state.lengths_b)
  count_b = jnp.where(state.done_b, 0, count_b).astype(jnp.int32)
  ended_b = jnp.any(is_end_bt, axis=1) & (count_b == through_end_b)
  lengths_b = state.lengths_b + count_b

  slot_s = jnp.arange(state.tokens_bs.shape[1])[None]
  offset_bs = jnp.clip(slot_s - state.lengths_b[:, None], 0, t - 1)
  fresh_bs = (slot_s >= state.lengths_b[:, None]) & (slot_s < lengths_b[:, None])
  tokens_bs = jnp.where(fresh_bs, jnp.take_along_axis(block_bt, offset_bs, axis=1),
                        state.tokens_bs)
  stats = state.stats.replace(
      emitted_b=state.stats.emitted_b + count_b,
      target_calls_b=state.stats.target_calls_b + jnp.where(state.done_b, 0, 1))
  return state.replace(
      tokens_bs=tokens_bs, lengths_b=lengths_b, stats=stats,
      done_b=state.done_b | ended_b | (lengths_b >= state.limits_b)), count_b
