"""A step that was not finite, once more and row by row.

Training keeps the batch of such a step. Data order, dropout and rollouts follow from seed and
step, so the step itself is reached again from the last checkpoint before it.
"""

import functools
import io
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from specdistill_jax import processes
from specdistill_jax import sharding
from specdistill_jax import storage
from specdistill_jax.checkpoints import store
from specdistill_jax.stages import runs
from specdistill_jax.training import rollouts
from specdistill_jax.training import step as step_lib

FOLDER = 'replay'
_FIELDS = ('tokens_bt', 'loss_mask_bt', 'prompt_lengths_b', 'lengths_b')


def save(workdir: pathlib.Path, run: runs.Run, step: int, batch: Any) -> pathlib.Path:
  """Keeps the batch of a step under `workdir/replay`; all processes call it."""
  path = workdir / FOLDER / run.name / f'step_{step}.npz'
  held = sharding.fetch({name: getattr(batch, name) for name in _FIELDS})
  if processes.is_first():
    about = json.dumps(dict(stage=run.stage, run=run.name, step=step, seed=run.seed))
    kept = io.BytesIO()
    np.savez_compressed(kept, about=np.array(about), **held)
    storage.write(path, kept.getvalue())
  return path


def find(workdir: pathlib.Path, named: str) -> tuple[pathlib.Path, dict[str, Any]]:
  """The file that `named` means, a path or `step_123`, and what it is about.

  Raises:
    ValueError: no such file, or several.
  """
  found = [storage.path(named)] if named.endswith('.npz') else sorted(
      workdir.glob(f'{FOLDER}/*/{named}.npz'))
  if len(found) != 1 or not found[0].is_file():
    there = [str(path) for path in sorted(workdir.glob(f'{FOLDER}/*/*.npz'))]
    raise ValueError(f'--replay={named} names {len(found) if len(found) > 1 else "no"} kept '
                     f'steps; there are {", ".join(there) or "none"}')
  with np.load(storage.local(found[0])) as kept:
    return found[0], json.loads(str(kept['about']))


def fit(run: runs.Run, config: ml_collections.ConfigDict, workdir: pathlib.Path, *,
        path: pathlib.Path, about: dict[str, Any]) -> None:
  """In place of `train.fit`: repeats the kept step of the run that it is about, and prints it."""
  if run.name != about['run']:
    return
  ready, step = runs.ready(run, config), about['step']
  with store.Store(run.directory, keep=run.settings.keep_checkpoints) as checkpoints:
    first = checkpoints.latest_step()
    if first is not None and first >= step:
      raise ValueError(f'{run.directory} has gone on to step {first}, past step {step}')
    state = ready.start() if first is None else ready.restore(checkpoints, first)
  first = first or 0
  print(f'{run.name}: from step {first} to step {step}', flush=True)
  for _ in range(first + 1, step):
    state, _ = ready.update(state, ready.teacher, ready.put(next(ready.data)), ready.key)
  batch = ready.put(next(ready.data))
  with np.load(storage.local(path)) as kept:
    if not np.array_equal(kept['tokens_bt'], sharding.fetch(batch.tokens_bt)):
      print('the batch is not the kept one: the data have changed since', flush=True)
  _explain(ready, state, batch)
  _, metrics = ready.update(state, ready.teacher, batch, ready.key)
  print(f'the whole step: loss {float(metrics.loss):.6g}, grad_norm '
        f'{float(metrics.grad_norm):.6g}', flush=True)


def _explain(ready: runs.Ready, state, batch) -> None:
  """Prints, in the order in which things are computed, what is finite and what is not."""
  run = ready.run
  print(f'parameters before the step: {_faults(state.params) or "all finite"}')
  if run.rollout is not None:
    _, key = jax.random.split(jax.random.fold_in(ready.key, state.step))
    batch, on_policy = jax.jit(rollouts.mix, static_argnames='rollout')(
        sharding.matrices_in(state.params, run.settings.weights_dtype), batch, key,
        rollout=run.rollout)
    print('rows are of the student' if bool(on_policy) else 'rows are stored ones')
  look = jax.jit(functools.partial(_row, run.objective, run.settings.weights_dtype))
  first_fault = None
  for row in range(run.settings.batch_size):
    loss, tokens, grads = look(state.params, ready.teacher, batch, row)
    faults = _faults(grads)
    is_sound = np.isfinite(float(loss)) and not faults
    print(f'row {row}: loss {float(loss):.6g} over {float(tokens):g} tokens'
          + ('' if is_sound else f'; gradient not finite in {faults or "no parameter"}'))
    if first_fault is None and not is_sound:
      first_fault = row, faults
  if first_fault is None:
    print('every row alone is finite, in loss and gradient')
  else:
    print(f'not finite first: row {first_fault[0]}, {first_fault[1] or "its loss"}')


def _row(objective, dtype, params, teacher, batch, row):
  """Loss and tokens of one row, without dropout, and which gradients are not finite."""
  one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), batch)
  def loss(params):
    totals = step_lib.losses(objective, sharding.matrices_in(params, dtype), teacher, one)
    return totals.loss, totals.num_tokens
  (value, tokens), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return value, tokens, jax.tree.map(lambda g: jnp.where(jnp.isfinite(g).all(), 0.0, jnp.nan),
                                     grads)


def _faults(tree) -> str:
  """Names of the leaves that are not finite, the first three."""
  names = [jax.tree_util.keystr(path, simple=True, separator='/')
           for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
           if not bool(jnp.isfinite(leaf).all())]
  more = f' and {len(names) - 3} more' if len(names) > 3 else ''
  return ', '.join(names[:3]) + more
