"""The performance suite at one batch size: who takes part, and the rows that rounds amount to.

Speed and draft quality are kept apart. `speculative` decodes with a real draft and emits the
target's law; `simulated` takes the draft's time and keeps tokens at a rate that was asked for.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from specdistill_jax import structs
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import simulated
from specdistill_jax.decoding import state as state_lib
from specdistill_jax.evaluation import acceptance
from specdistill_jax.evaluation import contest
from specdistill_jax.evaluation import latency
from specdistill_jax.evaluation import measures
from specdistill_jax.evaluation import peers
from specdistill_jax.evaluation import step_costs

CLOCK_STEPS = 32  # of each timed loop of single steps, once a round

# What takes part, with the gamma that it drafts (0: nothing).
ALONE, CLOCK, MEMORY, PEER = ('autoregressive', 0), ('clock', 0), ('memory', 0), ('hf', 0)
SPECULATIVE, SIMULATED, ASSISTED = 'speculative', 'simulated', 'hf_assisted'
Competitors = dict[tuple[str, int], Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Case:
  """One batch of prompts, all of one length, and the ways to decode it.

  Attributes:
    module: the target, layers unrolled.
    drafters: by gamma.
    rules: by gamma; (the exact one, the simulated one).
    weight_bytes: of parameters that one target step must read.
    prompts_bt: prompts without padding.
    new_tokens: of each row; no end token cuts a row short.
  """
  module: Any
  drafters: Mapping[int, structs.Drafter]
  rules: Mapping[int, tuple[structs.Rule, simulated.Simulated]]
  weight_bytes: int
  prompts_bt: np.ndarray
  new_tokens: int
  sampling: sampling_lib.Sampling

  def setting(self, kind: str, gamma: int) -> step_costs.Setting:
    return step_costs.Setting(self.drafters[gamma],
                              self.rules[gamma][kind == SIMULATED])


def competitors(case: Case, key: jax.Array, read_probe: Callable[[], dict[str, float]],
                peer: peers.Peer | None) -> Competitors:
  """Everything that is to happen once in a round, by (kind, gamma)."""
  batch, width = case.prompts_bt.shape
  inputs = (case.prompts_bt, np.full((batch,), width, np.int32))
  common = dict(sampling=case.sampling, max_new_tokens=case.new_tokens)
  full = dict(common, eos_id=step_costs.NO_TOKEN)
  counter = itertools.count()
  next_key = lambda: jax.random.fold_in(key, next(counter))
  clock = step_costs.Clock(
      case.module, {gamma: case.setting(SPECULATIVE, gamma) for gamma in case.drafters},
      steps=CLOCK_STEPS, **common)
  chosen = {ALONE: lambda: latency.alone(case.module, *inputs, next_key(), **full)}
  for kind, gamma in itertools.product((SPECULATIVE, SIMULATED), case.drafters):
    chosen[kind, gamma] = lambda setting=case.setting(kind, gamma): latency.speculative(
        case.module, setting, *inputs, next_key(), **full)
  if peer is not None:
    chosen[PEER] = lambda: peer.generate(case.prompts_bt, case.new_tokens)
  if peer is not None and batch == 1:  # transformers assists one row at a time
    for gamma in case.drafters:
      chosen[ASSISTED, gamma] = lambda gamma=gamma: peer.generate(
          case.prompts_bt, case.new_tokens, gamma)
  # Last, so that in warming up each decoder compiles what it needs and not the clock.
  return chosen | {CLOCK: lambda: clock(*inputs, next_key()), MEMORY: read_probe}


def _seconds(name: tuple[str, int], prefill: bool = False) -> Callable[[contest.Round], float]:
  """Seconds a token of a competitor, in a round."""
  def value(one):
    run = one.results[name]
    if isinstance(run, dict):  # a peer, whose prefill can't be told apart
      return run['seconds'] / sum(map(len, run['tokens']))
    spent = run.seconds + (run.prefill_seconds if prefill else 0.0)
    return spent / float(run.generation.lengths.sum())
  return value


def _alone_row(case: Case, rounds: Sequence[contest.Round]) -> dict[str, Any]:
  """With what a step must read beside what memory can do.

  Weights that fit into a last-level cache are read faster than memory: a share above 1.
  """
  batch, width = case.prompts_bt.shape
  slots = state_lib.num_slots(width, case.new_tokens, 0)
  cache = jax.eval_shape(lambda: case.module.init_cache(batch, slots))
  buffers = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  # The mean length over the steps: those slots are live, and no step can do without them.
  live = buffers * (width + (case.new_tokens + 1) / 2) / slots
  step_bytes = case.weight_bytes + live
  per_step = lambda one: one.results[ALONE].seconds / case.new_tokens
  ceiling = lambda one: max(one.results[MEMORY].values()) * 1e9
  share, interval = contest.ratio(rounds, lambda one: step_bytes / per_step(one), ceiling)
  return dict(
      step_seconds=contest.median(rounds, per_step), weight_bytes_per_step=case.weight_bytes,
      live_cache_bytes_per_step=int(live), cache_buffer_bytes=buffers,
      read_gigabytes_per_second=step_bytes / contest.median(rounds, per_step) / 1e9,
      memory_read_ceiling_gigabytes_per_second=contest.median(rounds, ceiling) / 1e9,
      share_of_memory_read_ceiling=share, share_of_memory_read_ceiling_interval=interval)


def _speculative_row(case: Case, rounds: Sequence[contest.Round], kind: str,
                     gamma: int) -> dict[str, Any]:
  stats = [one.results[kind, gamma].generation.stats for one in rounds]
  reached, accepted = (sum(getattr(s, name).sum(axis=0) for s in stats)
                       for name in ('reached_bg', 'accepted_bg'))
  tau = float(sum(s.emitted_b.sum() for s in stats) / sum(s.target_calls_b.sum() for s in stats))
  clock = lambda one: one.results[CLOCK][gamma]
  # The larger of both medians, as in `step_costs.mean`.
  cost_ratio, verify_ratio = (max(
      contest.ratio(rounds, lambda one: getattr(clock(one), part)[which],
                    lambda one: clock(one).target)[0] for which in (0, 1))
      for part in ('draft', 'verify'))
  measured, interval = contest.ratio(rounds, _seconds(ALONE), _seconds((kind, gamma)))
  predicted = measures.speedup_predicted(tau, gamma, cost_ratio, verify_ratio)
  rule = case.rules[gamma][kind == SIMULATED]
  return dict(
      rule=type(rule).__name__.lower(), lossless=rule.lossless,
      acceptance_asked=rule.acceptance if kind == SIMULATED else None,
      acceptance_by_position=acceptance.by_position(accepted, reached), block_efficiency=tau,
      cost_ratio=cost_ratio, verify_ratio=verify_ratio, speedup_predicted=predicted,
      speedup_measured=measured, speedup_measured_interval=interval,
      speedup_measured_over_predicted=measured / predicted)


def _identical(rounds: Sequence[contest.Round], name: tuple[str, int]) -> bool:
  """Whether a competitor said what the target alone says, token for token, in every round."""
  def tokens(run):
    return np.asarray(run['tokens'] if isinstance(run, dict) else run.generation.tokens)
  return all(np.array_equal(tokens(one.results[name]), tokens(one.results[ALONE]))
             for one in rounds)


def _peer_row(rounds: Sequence[contest.Round], name: tuple[str, int]) -> dict[str, Any]:
  """Both with prefill: ours alone against `generate`, ours speculative against assisted."""
  ours = ALONE if name == PEER else (SPECULATIVE, name[1])
  faster, interval = contest.ratio(rounds, _seconds(name), _seconds(ours, prefill=True))
  own = contest.ratio(rounds, _seconds(PEER), _seconds(name))[0]
  calls = sum(one.results[name]['target_calls'] for one in rounds)
  # Prefill is a call, and its logits give a token.
  emitted = sum(sum(map(len, one.results[name]['tokens'])) for one in rounds)
  return dict(ours_over_peer=faster, ours_over_peer_interval=interval,
              speedup_over_own_generate=own, target_calls=calls,
              block_efficiency=emitted / calls if name != PEER else None)


def rows(case: Case, played: Sequence[contest.Round]) -> list[dict[str, Any]]:
  """One row for each competitor that decodes, judged by the undisturbed rounds if there are."""
  rounds, is_quiet = contest.undisturbed(played)
  batch = len(case.prompts_bt)
  found = []
  for name in played[0].results:
    if name in (CLOCK, MEMORY):
      continue
    kind, gamma = name
    if name == ALONE:
      row = _alone_row(case, rounds)
    elif kind in (SPECULATIVE, SIMULATED):
      row = _speculative_row(case, rounds, kind, gamma)
    else:
      row = _peer_row(rounds, name)
    is_peer = isinstance(rounds[0].results[name], dict)
    says_the_same = case.sampling.is_greedy and kind != SIMULATED and name != ALONE
    speed = lambda prefill: 1.0 / contest.median(rounds, _seconds(name, prefill))
    found.append(dict(
        competitor=kind, gamma=gamma or None, batch_size=batch,
        tokens_per_second=None if is_peer else speed(False),
        tokens_per_second_with_prefill=speed(True),
        identical_to_autoregressive=_identical(rounds, name) if says_the_same else None,
        rounds_counted=len(rounds), undisturbed=is_quiet, **row))
  return sorted(found, key=lambda row: (row['competitor'], row['gamma'] or 0))
