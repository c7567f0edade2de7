"""Speculative decoding with a chain or a tree of drafted tokens.

A cycle: the drafter proposes gamma tokens, one target call scores root and proposal, a rule
keeps a prefix and adds one token, caches go back to what was kept. Rows advance by their own
1 to gamma + 1 tokens, and may have drafted fewer than gamma. Knows a target only
as a `TargetFn`, a drafter only as a `structs.Drafter`. A tree lives from `propose` to `verify`:
what is committed is one path of it, a chain again.
"""

import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.decoding import judging
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib
from specdistill_jax.decoding import tree
from specdistill_jax.decoding import tree_judging


def prefill(target: structs.Decodable, drafter: structs.Drafter, prompts_bt: jax.Array,
            prompt_lengths_b: jax.Array, key: jax.Array, *,
            max_new_tokens: int) -> structs.DecodeState:
  """Reads the prompts into both models."""
  room = state_lib.num_slots(0, max_new_tokens, state_lib.num_drafted(drafter))
  start, output = state_lib.read_prompts(target, prompts_bt, prompt_lengths_b, room)
  state = state_lib.init(start.tokens_bt, start.lengths_b, key, output.cache,
                         max_new_tokens=max_new_tokens, gamma=drafter.gamma, room=room)
  return state.replace(drafter_state=drafter.prefill(
      prompts_bt, prompt_lengths_b, output, state.tokens_bs.shape[1]))


def verify(target_fn: structs.TargetFn, state: structs.DecodeState, proposal: structs.Proposal,
           rule: structs.Rule, key_b: jax.Array, sampling: sampling_lib.Sampling
           ) -> tuple[structs.Proposal, structs.Verdict, structs.TargetOutput]:
  """One target call on root and proposal, judged by the rule under the law that it asks for.

  The block is as wide as the longest draft, whatever each row drafted: shapes are static.
  Returns the judged chain with its verdict, and the target's output at the root and along it:
  the proposal as it came, or the accepted path of a tree.
  """
  block_bt = jnp.concatenate(
      [state_lib.last_tokens(state)[:, None], proposal.tokens_bg], axis=1)
  length_b, slots = state.lengths_b - 1, state.tokens_bs.shape[1]
  law = getattr(rule, 'law', None) or sampling
  if proposal.branches is None:
    positions_bt, mask_bts = state_lib.block_positions(length_b, block_bt.shape[1], slots)
    output = target_fn(block_bt, positions_bt, mask_bts, state.target_cache)
    log_probs_btv = sampling_lib.warp(output.logits_btv, law)
    return proposal, rule(log_probs_btv, proposal, key_b), output

  positions_bt = length_b[:, None] + proposal.branches.depths_bt
  mask_bts = tree.mask(length_b, proposal.branches.ancestors_btt, slots)
  output = target_fn(block_bt, positions_bt, mask_bts, state.target_cache)
  law_at = lambda slot_b: sampling_lib.warp(judging.at_position(output.logits_btv, slot_b), law)
  verdict, path_bt, examined_b = tree_judging.judge(rule, law_at, proposal, key_b)
  path = structs.Proposal(
      tokens_bg=tree.along(block_bt, path_bt)[:, 1:], log_probs_bgv=None,
      drafter_state=proposal.drafter_state, num_drafted_b=examined_b)
  return path, verdict, structs.TargetOutput(
      logits_btv=tree.along(output.logits_btv, path_bt),
      features={name: tree.along(x, path_bt) for name, x in output.features.items()},
      cache=output.cache.keep_path(length_b, path_bt))


def count_drafted(state: structs.DecodeState, proposal: structs.Proposal) -> structs.DecodeState:
  drafted_b = jnp.where(state.done_b, 0, judging.num_drafted(proposal))
  return state.replace(stats=state.stats.replace(drafted_b=state.stats.drafted_b + drafted_b))


def commit(state: structs.DecodeState, proposal: structs.Proposal, verdict: structs.Verdict,
           eos_id: int | tuple[int, ...]) -> structs.DecodeState:
  """Appends what the verdict kept and the next token; brings the counts up to date."""
  gamma = proposal.tokens_bg.shape[1]
  index_g = jnp.arange(gamma)[None]
  padded_bt = jnp.pad(proposal.tokens_bg, ((0, 0), (0, 1)))
  is_next_bt = jnp.arange(gamma + 1)[None] == verdict.num_accepted_b[:, None]
  block_bt = jnp.where(is_next_bt, verdict.next_token_b[:, None], padded_bt)
  state, count_b = state_lib.append(state, block_bt, verdict.num_accepted_b + 1, eos_id)
  # What lies behind the row's end or budget was neither reached nor accepted.
  reached_bg = (index_g < count_b[:, None]) & judging.is_drafted(proposal)
  accepted_bg = reached_bg & (index_g < verdict.num_accepted_b[:, None])
  stats = state.stats.replace(
      reached_bg=state.stats.reached_bg + reached_bg.astype(jnp.int32),
      accepted_bg=state.stats.accepted_bg + accepted_bg.astype(jnp.int32))
  return state.replace(stats=stats)


def cycle(target_fn: structs.TargetFn, drafter: structs.Drafter, state: structs.DecodeState, *,
          rule: structs.Rule, sampling: sampling_lib.Sampling, eos_id: int | tuple[int, ...]
          ) -> tuple[structs.DecodeState, structs.Proposal, structs.Proposal, structs.Verdict]:
  """Proposes, verifies, commits.

  Returns the new state, and for who looks on: what was drafted, the chain that was judged (of a
  tree the accepted path), and the verdict.
  """
  next_key_b, propose_key_b, verify_key_b = sampling_lib.split_rows(state.key_b, 3)
  drafted = drafter.propose(state, propose_key_b)
  state = count_drafted(state, drafted)
  judged, verdict, output = verify(target_fn, state, drafted, rule, verify_key_b, sampling)
  state = commit(state, judged, verdict, eos_id)
  state = state.replace(
      key_b=next_key_b, target_cache=output.cache.rollback(state.lengths_b - 1),
      drafter_state=drafter.commit(state, judged, verdict, output))
  return state, drafted, judged, verdict


def step(target_fn: structs.TargetFn, drafter: structs.Drafter, state: structs.DecodeState,
         **how) -> structs.DecodeState:
  """The state after one `cycle`."""
  return cycle(target_fn, drafter, state, **how)[0]


def decode(target_fn: structs.TargetFn, drafter: structs.Drafter, state: structs.DecodeState, *,
           rule: structs.Rule, sampling: sampling_lib.Sampling,
           eos_id: int | tuple[int, ...] = structs.EOS_ID) -> structs.DecodeState:
  """Runs until every row is done: one `lax.while_loop`, no host round trip."""
  body = lambda state: step(target_fn, drafter, state, rule=rule, sampling=sampling,
                            eos_id=eos_id)
  return state_lib.run(body, state)
