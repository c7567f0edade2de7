"""Time per token with and without speculation, and what a step of each part costs.

Everything that is compared is measured interleaved: batch by batch of prompts, and within a
batch setting by setting, so that a noisy machine hits all of them alike. Calls are compiled and
warm, clocks stop after `block_until_ready`, prefill is left out and kept apart.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from specdistill_jax import structs
from specdistill_jax.decoding import engine
from specdistill_jax.decoding import sampling as sampling_lib
from specdistill_jax.evaluation import step_costs

CLOCK_EVERY = 4  # batches between two timings of single steps
ALONE_EVERY = 3  # settings between two measurements of the target alone


@dataclasses.dataclass(frozen=True)
class Run:
  """One batch of prompts decoded once.

  Attributes:
    seconds: decoding, prefill left out.
    prefill_seconds: reading the prompts.
    generation: the new tokens and the counts, as numpy arrays.
  """
  seconds: float
  prefill_seconds: float
  generation: structs.Generation


@dataclasses.dataclass(frozen=True)
class Batch:
  """One batch of prompts, decoded alone and with every setting; `steps` of every few batches."""
  alone: Run
  runs: dict[Hashable, Run]
  steps: dict[Hashable, step_costs.StepSeconds]


class Kept(Protocol):
  """Batches that are safe from a kill, by their number."""

  def read(self, index: int) -> Batch | None: ...

  def write(self, index: int, batch: Batch) -> None: ...


@dataclasses.dataclass(frozen=True)
class Measurement:
  """What `measure` found; `alone` and `runs` have one entry for each batch of prompts.

  Attributes:
    alone: the target without a drafter; seconds averaged over its repetitions.
    runs: by setting.
    steps: by setting, a few entries; drafters that differ in weights or gamma only share
      their draft step.
  """
  alone: list[Run]
  runs: dict[Hashable, list[Run]]
  steps: dict[Hashable, list[step_costs.StepSeconds]]


def _run(prefill: Callable[[], Any], decode: Callable[[Any], Any],
         max_new_tokens: int) -> Run:
  prefill_seconds, state = step_costs.timed(prefill)
  seconds, state = step_costs.timed(lambda: decode(state))
  generation = engine.generation(state, max_new_tokens=max_new_tokens)
  return Run(seconds, prefill_seconds, jax.device_get(generation))


def alone(module: Any, prompts_bt: np.ndarray, prompt_lengths_b: np.ndarray, key: jax.Array, *,
          sampling: sampling_lib.Sampling, max_new_tokens: int,
          eos_id: int | tuple[int, ...] | None = None) -> Run:
  """Decodes the target by itself. `module` has its layers unrolled.

  `eos_id` ends a row; None: the model's own, `step_costs.NO_TOKEN`: rows run their full length.
  """
  return _run(
      lambda: engine.prefill_autoregressive(module, prompts_bt, prompt_lengths_b, key,
                                            max_new_tokens=max_new_tokens),
      lambda state: engine.decode_autoregressive(module, state, sampling=sampling,
                                                 eos_id=eos_id),
      max_new_tokens)


def speculative(module: Any, setting: step_costs.Setting, prompts_bt: np.ndarray,
                prompt_lengths_b: np.ndarray, key: jax.Array, *,
                sampling: sampling_lib.Sampling, max_new_tokens: int,
                eos_id: int | tuple[int, ...] | None = None) -> Run:
  """Decodes the target with a drafter; `eos_id` as in `alone`."""
  return _run(
      lambda: engine.prefill_speculative(module, setting.drafter, prompts_bt, prompt_lengths_b,
                                         key, max_new_tokens=max_new_tokens),
      lambda state: engine.decode_speculative(module, setting.drafter, state, rule=setting.rule,
                                              sampling=sampling, eos_id=eos_id),
      max_new_tokens)


Settings = dict[Hashable, step_costs.Setting]


def _compiled_alike(settings: Settings) -> Settings:
  """One setting of each kind that shares a compilation."""
  return {(step_costs.family(setting.drafter), setting.drafter.gamma,
           getattr(setting.drafter, 'min_confidence', 0.0), setting.rule): setting
          for setting in settings.values()}


def _mean(runs: Sequence[Run]) -> Run:
  """The same tokens decoded several times: their mean times."""
  return dataclasses.replace(
      runs[0], seconds=float(np.mean([run.seconds for run in runs])),
      prefill_seconds=float(np.mean([run.prefill_seconds for run in runs])))


def _unseen(items: Sequence[Any], what: str) -> Iterable[Any]:
  del what
  return items


def measure(module: Any, settings: Settings,
            batches: Sequence[tuple[np.ndarray, np.ndarray]], key: jax.Array, *,
            sampling: sampling_lib.Sampling, max_new_tokens: int,
            kept: Kept | None = None,
            progress: Callable[[Sequence[Any], str], Iterable[Any]] = _unseen) -> Measurement:
  """Decodes every batch alone and with every setting, and times single steps in between.

  Args:
    module: the target, layers unrolled.
    settings: what to compare, by any name.
    batches: (prompts_bt, prompt_lengths_b), all of one shape, so that one compilation serves.
    key: batch i draws from `fold_in(key, i)`, the same in every setting.
    kept: batches of an earlier call, which are not measured again; where new ones go.
    progress: wraps the loops over settings to compile and over batches that are left, which it
      is told in a word, for a progress bar.
  """
  common = dict(sampling=sampling, max_new_tokens=max_new_tokens)
  clock = step_costs.Clock(module, settings, **common)

  def decode_all(inputs, chosen, seen=_unseen):
    """The target alone, again before every few settings, and each of the settings."""
    alones, runs = [], {}
    for index, (name, setting) in enumerate(seen(list(chosen.items()), 'settings compiled')):
      if index % ALONE_EVERY == 0:
        alones.append(alone(module, *inputs, **common))
      runs[name] = speculative(module, setting, *inputs, **common)
    return _mean(alones), runs

  found = {index: None if kept is None else kept.read(index) for index in range(len(batches))}
  left = [index for index, batch in found.items() if batch is None]
  if left:
    warm_up = (*batches[0], key)
    decode_all(warm_up, _compiled_alike(settings), progress)
    clock(*warm_up)
  for index in progress(left, 'batches'):
    inputs = (*batches[index], jax.random.fold_in(key, index))
    found[index] = Batch(*decode_all(inputs, settings),
                         clock(*inputs) if index % CLOCK_EVERY == 0 else {})
    if kept is not None:
      kept.write(index, found[index])
  return Measurement(
      [batch.alone for batch in found.values()],
      {name: [batch.runs[name] for batch in found.values()] for name in settings},
      {name: [batch.steps[name] for batch in found.values() if name in batch.steps]
       for name in settings})
