"""The jitted entry points: prefill and decode, apart, so that each can be timed alone.

A `module` is a `structs.Decodable`: any pytree that is a `structs.TargetFn` and says where it
begins. Encoding prompts belongs to prefill. States are donated: a decode call overwrites the
buffers that prefill made. Rows end with the module's own `eos_id` unless a call names another.
"""

import functools

import jax

from specdistill_jax import structs
from specdistill_jax.decoding import autoregressive
from specdistill_jax.decoding import chain
from specdistill_jax.decoding import state as state_lib


@functools.partial(jax.jit, static_argnames=('max_new_tokens',))
def prefill_autoregressive(module: structs.Decodable, prompts_bt: jax.Array,
                           prompt_lengths_b: jax.Array, key: jax.Array, *,
                           max_new_tokens: int) -> structs.DecodeState:
  """Reads prompts `[b, t]`, right-padded, of lengths `[b]`; the target alone decodes after it.

  Args:
    key: of the batch; each row draws from its own, so that neighbours change nothing.
    max_new_tokens: that buffers and caches have room for.
  """
  return autoregressive.prefill(module, prompts_bt, prompt_lengths_b, key,
                                max_new_tokens=max_new_tokens)


@functools.partial(jax.jit, static_argnames=('sampling', 'eos_id'), donate_argnames=('state',))
def decode_autoregressive(module, state: structs.DecodeState, *, sampling,
                          eos_id: int | tuple[int, ...] | None = None) -> structs.DecodeState:
  """A token a row and turn, until every row has ended or is full; `state` is overwritten.

  Args:
    sampling: `sampling.Sampling`, static: temperature, top-k, top-p.
    eos_id: one or several; None: the module's own.
  """
  eos_id = state_lib.end_ids(module) if eos_id is None else eos_id
  return autoregressive.decode(module, state, sampling=sampling, eos_id=eos_id)


@functools.partial(jax.jit, static_argnames=('max_new_tokens',))
def prefill_speculative(module: structs.Decodable, drafter: structs.Drafter,
                        prompts_bt: jax.Array, prompt_lengths_b: jax.Array, key: jax.Array, *,
                        max_new_tokens: int) -> structs.DecodeState:
  """As `prefill_autoregressive`, for the target and what drafts for it."""
  return chain.prefill(module, drafter, prompts_bt, prompt_lengths_b, key,
                       max_new_tokens=max_new_tokens)


@functools.partial(jax.jit, static_argnames=('rule', 'sampling', 'eos_id'),
                   donate_argnames=('state',))
def decode_speculative(module, drafter: structs.Drafter, state: structs.DecodeState, *, rule,
                       sampling, eos_id: int | tuple[int, ...] | None = None
                       ) -> structs.DecodeState:
  """A cycle a turn (draft, verify, commit), until every row has ended; `state` is overwritten.

  Args:
    rule: what is kept of a draft, of `decoding.rules`, static.
    sampling, eos_id: as in `decode_autoregressive`; `sampling` is the target's.
  """
  eos_id = state_lib.end_ids(module) if eos_id is None else eos_id
  return chain.decode(module, drafter, state, rule=rule, sampling=sampling, eos_id=eos_id)


@functools.partial(jax.jit, static_argnames=('max_new_tokens',))
def generation(state: structs.DecodeState, *, max_new_tokens: int) -> structs.Generation:
  """The new tokens of a finished state, padded to `max_new_tokens`."""
  return structs.Generation(tokens=state_lib.new_tokens(state, max_new_tokens),
                            lengths=state.stats.emitted_b, stats=state.stats)
