"""What of a cycle with a dynamic tree is neither draft nor target, on this machine: a JSON line.

  PYTHONPATH=. python tests/tree_costs.py [preset] [family] [rounds]

Cycles at batch 1 and temperature 0 with the default tree (10 children, 6 levels, 60 nodes), beside
loops of the same network calls on tokens, masks and positions that cost nothing: a difference of
expansion, ranking, masks, judging and keeping the path. Random weights, a prompt of 64 tokens, both
in interleaved rounds of 32 cycles, compiled before.
"""

import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from specdistill_jax.decoding import chain
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import rules
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib
from specdistill_jax.decoding import tree as tree_lib
from specdistill_jax.drafters import built
from specdistill_jax.drafters import families
from specdistill_jax.models import synthetic

CYCLES, PROMPT = 32, 64
GREEDY = sampling_lib.Sampling(temperature=0.0)
TREE = tree_lib.Dynamic()
RULE = rules.for_sampling('exact', 1.0, GREEDY)


@functools.partial(jax.jit, donate_argnums=2)
def cycles(module, drafter, state):
  step = functools.partial(chain.step, module, drafter, rule=RULE, sampling=GREEDY,
                           eos_id=-1)
  return state_lib.repeat(step, state, CYCLES)


@functools.partial(jax.jit, donate_argnums=2)
def networks(module, drafter, state):
  """Calls of a cycle's shapes; each call's tokens come from the logits of the one before."""
  draft, tree = drafter.draft, drafter.tree
  token_from = lambda logits_btv: jnp.max(
      jnp.argmax(logits_btv, axis=-1), axis=-1, keepdims=True).astype(jnp.int32)

  def step(state):
    held = state.drafter_state
    slots = drafter._slots(state.tokens_bs.shape[1])  # pylint: disable=protected-access
    def feed(token_b1, carried_btd, cache):
      positions_bt, mask_bts = state_lib.block_positions(
          cache.length_b, carried_btd.shape[1], slots)
      tokens_bt = jnp.broadcast_to(token_b1, carried_btd.shape[:2])
      return draft.read(tokens_bt, carried_btd, positions_bt, mask_bts, cache)
    last_b1 = state_lib.last_tokens(state)[:, None]
    read_btd, carried_btd, cache = feed(last_b1, held.carried_btd, held.cache)
    token_b1, cache = token_from(draft.logits(read_btd[:, :1])), cache.rollback(state.lengths_b - 1)
    carried_btd = jnp.repeat(carried_btd[:, :1], tree.top_k, axis=1)
    for _ in range(tree.depth - 1):
      read_btd, carried_btd, cache = feed(token_b1, carried_btd, cache)
      token_b1 = token_from(draft.logits(read_btd))
    positions_bt, mask_bts = state_lib.block_positions(
        state.lengths_b - 1, tree.num_nodes + 1, state.tokens_bs.shape[1])
    output = module(jnp.broadcast_to(token_b1, positions_bt.shape), positions_bt, mask_bts,
                    state.target_cache)
    lengths_b = state.lengths_b + 1
    return state.replace(
        lengths_b=lengths_b, target_cache=output.cache.rollback(lengths_b - 1),
        tokens_bs=state.tokens_bs.at[:, -1].set(token_from(output.logits_btv)[:, 0]),
        drafter_state=held.replace(cache=cache.rollback(lengths_b - 2), carried_btd=draft.inputs(
            output)[:, :tree.depth + 1]))

  return state_lib.repeat(step, state, CYCLES)


def main(preset='medium', family='eagle', rounds='9'):
  target, _ = synthetic.pair(synthetic.config(preset), jax.random.key(0))
  config = families.config(dict(family=family), target.config)
  draft = jax.jit(families.init, static_argnums=0)(config, jax.random.key(1))
  module = built.target(target.module, draft)
  drafter = built.drafter(draft, target.module, TREE, GREEDY)
  prompt = np.random.default_rng(0).integers(2, target.config.vocab_size, (1, PROMPT))
  begin = lambda: jax.block_until_ready(engine.prefill_speculative(
      module, drafter, jnp.asarray(prompt, jnp.int32), jnp.array([PROMPT]), jax.random.key(2),
      max_new_tokens=CYCLES * (TREE.depth + 1) + 1))

  def seconds(loop):
    state = begin()
    started = time.perf_counter()
    jax.block_until_ready(loop(module, drafter, state))
    return time.perf_counter() - started

  seconds(cycles), seconds(networks)
  pairs = [(seconds(cycles), seconds(networks)) for _ in range(int(rounds))]
  shares = [1 - alone / whole for whole, alone in pairs]
  print(json.dumps(dict(
      preset=preset, family=family, tree=[TREE.top_k, TREE.depth, TREE.num_nodes],
      target_parameters=sum(x.size for x in jax.tree.leaves(target.module)),
      draft_parameters=sum(x.size for x in jax.tree.leaves(draft)),
      cycle_ms=1e3 * float(np.median([whole for whole, _ in pairs])) / CYCLES,
      networks_ms=1e3 * float(np.median([alone for _, alone in pairs])) / CYCLES,
      share=float(np.median(shares)), shares=[round(share, 3) for share in shares])))


if __name__ == '__main__':
  main(*sys.argv[1:])
