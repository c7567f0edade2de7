"""What one step of the target, of a draft, and of a verification costs.

The steps run in loops inside one jitted call, so that the dispatch of a call does not count;
as in a decode loop, a step includes its sampling and its bookkeeping. Calls are warm, and
clocks stop after `block_until_ready`.

In a decode loop a draft's first step finds the target's weights in the caches, not its own, and
a verification the draft's. Steps timed by themselves would be too fast: each draft block is
timed after a pass over the target's weights and each verification after one over the draft's,
and the time of the passes alone is taken off; what is left counts unless it is less than
the same without passes, as noise makes it for small models. That is judged of the means over all
calls (`mean`): the larger of two noisy times is too large, however many calls there are.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specdistill_jax import structs
from specdistill_jax.decoding import autoregressive
from specdistill_jax.decoding import chain
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.decoding import state as state_lib

COST_STEPS = 64  # steps of one timed loop, unless told: they share the dispatch of its call
NO_TOKEN = -1    # an end token that never comes: loops run their full length


@dataclasses.dataclass(frozen=True)
class Setting:
  """One way to speculate: a drafter (its gamma and sampling included) and a rule."""
  drafter: structs.Drafter
  rule: structs.Rule


@dataclasses.dataclass(frozen=True)
class StepSeconds:
  """Seconds of one target step, one draft step, and one verification of root and draft.

  A draft step is a token of a chain, or a level of a tree on the mean, catching up included.
  Draft steps and verifications are timed alone, and with the other model's weights in the caches.
  """
  target: float
  draft: Sequence[float]
  verify: Sequence[float]


def mean(steps: Sequence[StepSeconds]) -> tuple[float, float, float]:
  """Seconds of a target step, a draft step and a verification, over any number of calls."""
  draft, verify = (max(sum(times) / len(steps) for times in zip(*of, strict=True))
                   for of in ([step.draft for step in steps], [step.verify for step in steps]))
  return sum(step.target for step in steps) / len(steps), draft, verify


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
  started = time.perf_counter()
  result = jax.block_until_ready(call())
  return time.perf_counter() - started, result


def _pass_over(weights, key_b):
  """Reads all of `weights`; whether each array has one same number, which never happens."""
  # A number that changes from step to step keeps the compiler from reading once for all steps.
  number = jax.random.key_data(key_b)[0, 0].astype(jnp.float32) + 0.5
  found = [jnp.any(leaf.astype(jnp.float32) == number) for leaf in jax.tree.leaves(weights)]
  return functools.reduce(jnp.logical_and, found)


def _after_pass(state, weights, passing=True):
  """The same state, which waits for a pass over `weights` if there is one."""
  # Only a flag leaves the branch: a state that did would be copied, caches included.
  never = jax.lax.cond(passing, _pass_over, lambda *_: jnp.array(False), weights, state.key_b)
  return state.replace(tokens_bs=jnp.where(never, 0, state.tokens_bs))


@functools.partial(jax.jit, static_argnames=('steps',), donate_argnames=('state',))
def _passes(weights, state, *, steps):
  def step(state):
    next_key_b, = sampling_lib.split_rows(state.key_b, 1)
    return _after_pass(state, weights).replace(key_b=next_key_b)

  return state_lib.repeat(step, state, steps)


@functools.partial(jax.jit, static_argnames=('sampling', 'steps'), donate_argnames=('state',))
def _target_steps(module, state, *, sampling, steps):
  return state_lib.repeat(
      lambda state: autoregressive.step(module, state, sampling, NO_TOKEN), state, steps)


@functools.partial(jax.jit, static_argnames=('steps',), donate_argnames=('state',))
def _draft_steps(drafter, module, passing, output, state, *, steps):
  """Proposes `steps` times from the same length, each time from another last token."""
  rejected = structs.Verdict(jnp.zeros_like(state.lengths_b), state.lengths_b)

  def step(state):
    state = _after_pass(state, module, passing)
    next_key_b, draw_key_b = sampling_lib.split_rows(state.key_b, 2)
    proposal = drafter.propose(state, draw_key_b)
    # A root that changes keeps the compiler from moving its layers out of the loop.
    rows_b = jnp.arange(state.lengths_b.shape[0])
    tokens_bs = state.tokens_bs.at[rows_b, state.lengths_b - 1].set(proposal.tokens_bg[:, -1])
    state = state.replace(tokens_bs=tokens_bs, key_b=next_key_b)
    return state.replace(drafter_state=drafter.commit(state, proposal, rejected, output))

  return state_lib.repeat(step, state, steps)


@functools.partial(jax.jit, static_argnames=('rule', 'sampling', 'steps'),
                   donate_argnames=('state',))
def _verify_steps(module, proposal, drafter, passing, state, *, rule, sampling, steps):
  """A cycle without its drafting: target call, rule, commit, rollback."""
  def step(state):
    state = _after_pass(state, drafter, passing)
    next_key_b, verify_key_b = sampling_lib.split_rows(state.key_b, 2)
    judged, verdict, output = chain.verify(module, state, proposal, rule, verify_key_b, sampling)
    state = chain.commit(state, judged, verdict, NO_TOKEN)
    return state.replace(key_b=next_key_b,
                         target_cache=output.cache.rollback(state.lengths_b - 1))

  return state_lib.repeat(step, state, steps)


def _any_proposal(drafter: structs.Drafter, state: structs.DecodeState) -> structs.Proposal:
  """A proposal of the right shape; what a chain says doesn't change what verifying it costs."""
  shapes = jax.eval_shape(lambda: drafter.propose(state, state.key_b))
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                      shapes.replace(drafter_state=None, num_drafted_b=None))


@functools.partial(jax.jit, static_argnames=('rule', 'sampling'))
def _first_cycle(module, drafter, state, *, rule, sampling):
  """What a drafter of trees proposes, and what it is then shown of the target.

  A tree is judged as far as it is kept. Where its proposal is repeated later in a text, hardly
  more than its first level is.
  """
  proposal = drafter.propose(state, state.key_b)
  _, _, output = chain.verify(module, state, proposal, rule, state.key_b, sampling)
  return proposal.replace(drafter_state=None), output.replace(cache=None)


def family(drafter: structs.Drafter) -> Hashable:
  """Equal for drafters that differ in weights or length only: their steps cost the same.

  Trees of different shapes do not.
  """
  shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(drafter))
  return type(drafter), getattr(drafter, 'sampling', None), getattr(drafter, 'tree', None), shapes


def _block(setting) -> Hashable:
  """Equal for settings whose verifications cost the same."""
  drafter = setting.drafter
  tree = getattr(drafter, 'tree', None)  # whose siblings are judged as they were drafted
  return drafter.gamma, tree, tree and drafter.sampling, setting.rule


def _never_stopping(drafter: structs.Drafter) -> structs.Drafter:
  """The same drafter at full length: what a step costs doesn't depend on how many are run."""
  if getattr(drafter, 'min_confidence', 0.0):
    return dataclasses.replace(drafter, min_confidence=0.0)
  return drafter


class Clock:
  """Times the single steps behind a set of settings, once for each batch of prompts it gets.

  A draft step is timed once for each family of drafters, a verification once for each block
  length and rule; `steps` of them in one call.
  """

  def __init__(self, module: Any, settings: dict[Hashable, Setting], *,
               sampling: sampling_lib.Sampling, max_new_tokens: int, steps: int = COST_STEPS):
    self._steps = steps
    self._module, self._settings = module, settings
    self._sampling, self._max_new_tokens = sampling, max_new_tokens
    families = {}
    for name, setting in settings.items():
      families.setdefault(family(setting.drafter), []).append(name)
    # The middle gamma stands for its family: the first draft step of a cycle is a little dearer.
    by_gamma = lambda name: (settings[name].drafter.gamma, str(name))
    self._examples = {kind: sorted(names, key=by_gamma)[len(names) // 2]
                      for kind, names in families.items()}

  def __call__(self, prompts_bt: np.ndarray, prompt_lengths_b: np.ndarray,
               key: jax.Array) -> dict[Hashable, StepSeconds]:
    inputs = (prompts_bt, prompt_lengths_b, key)
    target = self._target(*inputs)
    draft = {kind: self._draft(self._settings[name], *inputs)
             for kind, name in self._examples.items()}
    verify = {}
    for setting in self._settings.values():
      if _block(setting) not in verify:
        verify[_block(setting)] = self._verify(setting, *inputs)
    return {name: StepSeconds(target, draft[family(setting.drafter)], verify[_block(setting)])
            for name, setting in self._settings.items()}

  def _read(self, setting, *inputs):
    return jax.block_until_ready(engine.prefill_speculative(
        self._module, setting.drafter, *inputs, max_new_tokens=self._max_new_tokens))

  def _cycle(self, setting, *inputs):
    """A proposal and an output of the target, as the loops that are timed need them."""
    state = self._read(setting, *inputs)
    if not hasattr(setting.drafter, 'tree'):
      return jax.block_until_ready(_any_proposal(setting.drafter, state)), None
    return jax.block_until_ready(_first_cycle(self._module, setting.drafter, state,
                                              rule=setting.rule, sampling=self._sampling))

  def _target(self, *inputs):
    state = jax.block_until_ready(engine.prefill_autoregressive(
        self._module, *inputs, max_new_tokens=self._max_new_tokens))
    return timed(lambda: _target_steps(
        self._module, state, sampling=self._sampling, steps=self._steps))[0] / self._steps

  def _draft(self, setting, *inputs):
    drafter = _never_stopping(setting.drafter)
    output = self._cycle(setting, *inputs)[1]
    seconds = self._after_passes(self._module, setting, inputs, lambda passing, state: (
        _draft_steps(drafter, self._module, passing, output, state, steps=self._steps)))
    return [one / setting.drafter.gamma for one in seconds]

  def _verify(self, setting, *inputs):
    drafter = setting.drafter
    proposal = self._cycle(setting, *inputs)[0]
    return self._after_passes(drafter, setting, inputs, lambda passing, state: _verify_steps(
        self._module, proposal, drafter, passing, state.replace(drafter_state=None),
        rule=setting.rule, sampling=self._sampling, steps=self._steps))

  def _after_passes(self, weights, setting, inputs, call):
    """Seconds of a step of `call`, alone, and with `weights` in the caches, less their reading."""
    calls = dict(alone=functools.partial(call, False), both=functools.partial(call, True),
                 passes=lambda state: _passes(weights, state, steps=self._steps))
    seconds = {}
    for name, one in calls.items():
      state = self._read(setting, *inputs)
      seconds[name], _ = timed(lambda: one(state))
    return [one / self._steps for one in (
        seconds['alone'], seconds['both'] - seconds['passes'])]
