"""What `latency.measure` has found, a file for each batch, so that a killed measurement goes on."""

from collections.abc import Hashable, Mapping
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from specdistill_jax import storage
from specdistill_jax import structs
from specdistill_jax.evaluation import latency
from specdistill_jax.evaluation import step_costs


class BatchFiles:
  """A `latency.Kept` in a folder, as it was when this was made.

  A file knows its settings by all that is said of them: what was measured of others is not found.
  """

  def __init__(self, folder: pathlib.Path, settings: Mapping[Hashable, Mapping[str, Any]]):
    """`settings`: by the names that `measure` has, what JSON holds of each."""
    self._folder = folder
    self._keys = {name: hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
                  for name, said in settings.items()}
    self._there = {path.name for path in folder.glob('batch-*.json')}

  def _path(self, index: int) -> pathlib.Path:
    return self._folder / f'batch-{index:05d}.json'

  def read(self, index: int) -> latency.Batch | None:
    """A batch that was measured with these settings, perhaps among others; else None."""
    if self._path(index).name not in self._there:
      return None
    found = json.loads(self._path(index).read_text(encoding='utf-8'))
    if not set(self._keys.values()) <= set(found['runs']):
      return None
    steps = {name: step_costs.StepSeconds(**found['steps'][key])
             for name, key in self._keys.items() if key in found['steps']}
    return latency.Batch(_run(found['alone']), {
        name: _run(found['runs'][key]) for name, key in self._keys.items()}, steps)

  def write(self, index: int, batch: latency.Batch) -> None:
    """Leaves a batch, whole or not at all."""
    storage.write(self._path(index), json.dumps(dict(
        alone=_said(batch.alone),
        runs={key: _said(batch.runs[name]) for name, key in self._keys.items()},
        steps={key: dataclasses.asdict(batch.steps[name])
               for name, key in self._keys.items() if name in batch.steps})))


def _said(run: latency.Run) -> dict[str, Any]:
  generation = run.generation
  return dict(
      seconds=run.seconds, prefill_seconds=run.prefill_seconds, tokens=generation.tokens.tolist(),
      lengths=generation.lengths.tolist(),
      stats={field.name: getattr(generation.stats, field.name).tolist()
             for field in dataclasses.fields(generation.stats)})


def _run(said: Mapping[str, Any]) -> latency.Run:
  whole = lambda values: np.asarray(values, np.int32)
  stats = structs.DecodeStats(**{name: whole(values) for name, values in said['stats'].items()})
  return latency.Run(said['seconds'], said['prefill_seconds'], structs.Generation(
      whole(said['tokens']), whole(said['lengths']), stats))
