"""Checkpoints of training states and models, and the project's only importer of Orbax.

A directory holds `model.json` (the kind of model, its config, its vocabulary file with a
digest) and `checkpoints/<step>/` with four items: `params`, so that a model is read without
its optimizer; `optimizer`; `data`, the position of the data iterator; and `digests` of the
files of the others. Saves are asynchronous and atomic: a step's folder appears when it is
complete. A checkpoint whose files are not as they were written is passed over for the one
before it.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

from absl import logging
import jax
from jax.sharding import Mesh
import orbax.checkpoint as ocp

from specdistill_jax import processes
from specdistill_jax import sharding
from specdistill_jax import storage
from specdistill_jax.checkpoints import digests
from specdistill_jax.data import tokenizers
from specdistill_jax.drafters import families
from specdistill_jax.models import base

MODEL_FILE = 'model.json'
_DAMAGED = 'damaged'  # where such checkpoints are put
_KINDS = families.FAMILIES


class _DigestsHandler(ocp.CheckpointHandler):
  """Writes the digests when all other items are complete, before the checkpoint is."""

  def save(self, directory, args):
    del directory, args

  def finalize(self, directory):
    digests.write(directory.parent, directory)

  def restore(self, directory, args):
    raise NotImplementedError


@ocp.args.register_with_handler(_DigestsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _DigestsArgs(ocp.args.CheckpointArgs):
  pass


def _handlers():
  """The items, in the order in which they are completed: the digests last."""
  return dict(params=ocp.StandardCheckpointHandler(), optimizer=ocp.StandardCheckpointHandler(),
              data=ocp.JsonCheckpointHandler(), digests=_DigestsHandler())


class SaveFailed(OSError):
  """A checkpoint that was to be written beside the training was not."""


class Store:
  """The checkpoints of one run; a context manager that waits for pending saves on exit."""

  def __init__(self, directory: pathlib.Path, *, keep: int = 1):
    self._directory = storage.path(directory)
    self._folder = storage.absolute(self._directory / 'checkpoints')
    self._last_save = self._unchecked = None
    self._manager = ocp.CheckpointManager(
        self._folder, item_handlers=_handlers(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True))

  def __enter__(self) -> 'Store':
    return self

  def __exit__(self, kind, error, trace) -> None:
    try:
      self._manager.close()
    except Exception:
      if not isinstance(error, SaveFailed):  # which has told of it already
        raise

  def latest_step(self) -> int | None:
    """Updates done in the newest complete and undamaged checkpoint; None if there is none.

    Damaged ones are named in a warning and put aside, so that their step can be saved again.
    """
    self.wait()
    step = processes.agree('newest checkpoint', self._newest)
    self._manager.reload()
    return step

  def _newest(self):
    for step in sorted(ocp.utils.checkpoint_steps(self._folder), reverse=True):
      fault = digests.fault(self._folder / str(step))
      if fault is None:
        return step
      aside = self._directory / _DAMAGED / str(step)
      logging.warning('checkpoint %d of %s is damaged: %s; it is put aside in %s', step,
                      self._directory, fault, aside)
      storage.move(self._folder / str(step), aside)
    return None

  def save(self, step: int, params: Any, opt_state: Any, data_state: dict[str, Any]) -> None:
    """Starts to write a state; the caller may donate its buffers at once."""
    if step == self._last_save:
      return
    self._last_save = self._unchecked = step
    self._manager.save(step, args=ocp.args.Composite(
        params=ocp.args.StandardSave(_by_name(params)),
        optimizer=ocp.args.StandardSave(_by_name(opt_state)),
        data=ocp.args.JsonSave(data_state), digests=_DigestsArgs()))

  def check(self) -> None:
    """Looks whether the newest save has failed, without waiting for it; by all processes alike.

    Orbax raises what has failed when the next save begins, which may be hours later.

    Raises:
      SaveFailed: it has; in all processes at once, since process 0 says so for all.
    """
    if self._unchecked is None:
      return
    fault = processes.agree('newest save', self._fault)
    if fault is None:
      return
    step, self._unchecked = self._unchecked, None
    if fault:
      raise SaveFailed(f'checkpoint {step} of {self._directory} was not written ({fault}); mend '
                       'that, and the same command goes on from the checkpoint before it')

  def _fault(self) -> str | None:
    """Of the newest save: None while it goes on, then what was wrong with it, or ''."""
    if self._manager.is_saving_in_progress():
      return None
    try:
      self._manager.wait_until_finished()  # it has; this raises its error
    except Exception as error:  # of any library below
      return ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
    return ''

  def save_params(self, step: int, params: Any) -> None:
    """Starts to write a model that has neither optimizer nor data position."""
    self._manager.save(step, args=ocp.args.Composite(
        params=ocp.args.StandardSave(_by_name(params)), digests=_DigestsArgs()))

  def restore(self, step: int, params: Any, opt_state: Any, mesh: Mesh,
              layout: str = sharding.DEFAULT_LAYOUT) -> tuple[Any, Any, dict[str, Any]]:
    """Parameters, optimizer state and data position after `step`.

    Args:
      step: as `latest_step` says.
      params: abstract module, for its structure; likewise `opt_state`.
      mesh: where to lay them out, not necessarily the mesh they were saved from.
    """
    params, opt_state = (
        _abstract(params, mesh, layout), _abstract(opt_state, mesh, layout))
    restored = self._manager.restore(step, args=ocp.args.Composite(
        params=ocp.args.StandardRestore(_by_name(params)),
        optimizer=ocp.args.StandardRestore(_by_name(opt_state)),
        data=ocp.args.JsonRestore()))
    return (_like(params, restored['params']), _like(opt_state, restored['optimizer']),
            restored['data'])

  def wait(self) -> None:
    """Returns when everything saved so far is on disk."""
    self._manager.wait_until_finished()


def write_model_file(directory: pathlib.Path, config: Any,
                     vocabulary_path: pathlib.Path | None = None,
                     hub_config: dict[str, Any] | None = None) -> None:
  """Writes `model.json`, atomically. The vocabulary is named by its path from `directory`.

  A vocabulary is a file of ours, or a directory with a tokenizer; see `data.tokenizers`.
  """
  kind = next((name for name, (cls, _) in _KINDS.items() if isinstance(config, cls)), None)
  if kind is None:
    raise ValueError(f'a model with a {type(config).__name__} can\'t be stored; known kinds '
                     f'are {", ".join(_KINDS)}')
  vocabulary = None
  if vocabulary_path is not None:
    vocabulary = dict(path=os.path.relpath(vocabulary_path, directory),
                      digest=_digest(vocabulary_path))
  storage.write(directory / MODEL_FILE, json.dumps(
      dict(kind=kind, config=dataclasses.asdict(config), vocabulary=vocabulary,
           hub_config=hub_config), indent=2))


def save_model(directory: pathlib.Path, model: base.Model) -> None:
  """Writes a model that was not trained here, as step 0, with a copy of its vocabulary."""
  directory = storage.path(directory)
  vocabulary = directory / 'tokenizer' if model.vocabulary is not None else None
  if vocabulary is not None:
    with storage.filled(vocabulary) as folder:
      tokenizers.copy(model.vocabulary, folder)
  with Store(directory) as checkpoints:
    checkpoints.save_params(0, model.module)
  write_model_file(directory, model.config, vocabulary, model.hub_config)


def load_model(directory: pathlib.Path | str, mesh: Mesh | None = None, *,
               layout: str = sharding.DEFAULT_LAYOUT,
               weights_dtype: str | None = 'float32', **overrides: Any) -> base.Model:
  """The newest model in `directory`: parameters only, without the optimizer.

  Args:
    mesh: where to lay the parameters out; the first device if None.
    layout: how, one of `sharding.LAYOUTS`.
    weights_dtype: of the matrices, beside norms and biases in float32; a frozen model needs no
      float32. None: everything as it is stored.
    **overrides: fields of the model's config to change, for example `dropout`.

  Raises:
    ValueError: no model is there, or its vocabulary file is missing or another one.
  """
  directory = storage.path(directory)
  described = read_model_file(directory)
  config, init = load_config(directory, **overrides), _KINDS[described['kind']][1]
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  abstract = jax.eval_shape(lambda: init(config, jax.random.key(0)))
  if weights_dtype is not None:
    abstract = jax.eval_shape(
        functools.partial(sharding.matrices_in, dtype=weights_dtype), abstract)
  abstract = _abstract(abstract, mesh, layout)
  readers = {device.process_index for device in mesh.devices.flat}
  options = ocp.CheckpointManagerOptions(
      create=False, multiprocessing_options=ocp.options.MultiprocessingOptions(
          primary_host=min(readers), active_processes=readers,
          barrier_sync_key_prefix=f'of{min(readers)}to{max(readers)}'))
  folder = storage.absolute(directory / 'checkpoints')
  if not folder.exists():
    raise _no_checkpoint(directory)
  with ocp.CheckpointManager(folder, item_handlers=_handlers(), options=options) as manager:
    step = _newest_params(directory, manager.all_steps())
    if weights_dtype is None:
      abstract = _as_stored(abstract, manager.item_metadata(step)['params'])
    restored = manager.restore(step, args=ocp.args.Composite(
        params=ocp.args.StandardRestore(_by_name(abstract))))
  logging.info('read %s, step %d', directory, step)
  return base.Model(module=_like(abstract, restored['params']), config=config,
                    vocabulary=_vocabulary(directory, described['vocabulary']),
                    hub_config=described.get('hub_config'))


def weights_digest(directory: pathlib.Path | str) -> str:
  """What tells the checkpoints of `directory` from any others, by their lists of digests."""
  found = hashlib.sha256()
  for step in sorted((storage.path(directory) / 'checkpoints').glob('*')):
    if step.name.isdecimal() and (listed := digests.read(step)) is not None:
      found.update(step.name.encode() + listed)
  return found.hexdigest()


def _no_checkpoint(directory: pathlib.Path) -> ValueError:
  return ValueError(f'{directory} holds no complete checkpoint: train that model first')


def newest_step(directory: pathlib.Path | str) -> int:
  """The last complete checkpoint of the model in `directory`; reads no weights.

  Raises:
    ValueError: no model is there, or no complete checkpoint of it.
  """
  directory = storage.path(directory)
  read_model_file(directory)
  if steps := ocp.utils.checkpoint_steps(storage.absolute(directory / 'checkpoints')):
    return max(steps)
  raise _no_checkpoint(directory)


def _newest_params(directory, steps) -> int:
  """The newest step whose parameters are as they were written."""
  for step in sorted(steps, reverse=True):
    fault = digests.fault(directory / 'checkpoints' / str(step), ('params',))
    if fault is None:
      return step
    logging.warning('checkpoint %d of %s is passed over: %s', step, directory, fault)
  raise _no_checkpoint(directory)


def load_config(directory: pathlib.Path | str, **overrides: Any) -> Any:
  """The config of the model in `directory`, with `overrides` of its fields."""
  described = read_model_file(storage.path(directory))
  config_class = _KINDS[described['kind']][0]
  base.check_fields(config_class, overrides)
  return dataclasses.replace(config_class(**described['config']), **overrides)


def load_vocabulary(directory: pathlib.Path | str) -> Any:
  """The vocabulary of the model in `directory`, or None."""
  directory = storage.path(directory)
  return _vocabulary(directory, read_model_file(directory)['vocabulary'])


def vocabulary_path(directory: pathlib.Path | str) -> pathlib.Path | None:
  """Where the vocabulary of the model in `directory` lies, if it has one."""
  directory = storage.path(directory)
  described = read_model_file(directory)['vocabulary']
  return described and storage.resolve(directory, described['path'])


def read_model_file(directory: pathlib.Path) -> dict[str, Any]:
  """`model.json`: kind, config, vocabulary (path and digest) and hub_config."""
  path = directory / MODEL_FILE
  try:
    described = json.loads(path.read_text())
  except FileNotFoundError:
    raise ValueError(f'{path} is missing: {directory} is not the directory of a trained model'
                     ) from None
  if described['kind'] not in _KINDS:
    raise ValueError(f'{path}: kind is {described["kind"]!r}, and must be one of '
                     f'{", ".join(_KINDS)}')
  return described


def _vocabulary(directory, described):
  if described is None:
    return None
  path = storage.resolve(directory, described['path'])
  if not path.exists():
    raise ValueError(f'{path}, the vocabulary of {directory}, is missing')
  if _digest(path) != described['digest']:
    raise ValueError(f'{path} has digest {_digest(path)}, but {directory} was trained with '
                     f'{described["digest"]}: its token ids mean something else now')
  return tokenizers.load(path)


def _digest(path):
  path = storage.local(path)
  files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
  return hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()


def _abstract(tree, mesh, layout):
  shardings = sharding.parameter_shardings(tree, mesh, layout)
  return jax.tree.map(lambda leaf, layout: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=layout), tree, shardings)


def _as_stored(abstract, stored):
  """Shapes and layouts of `abstract`, dtypes as the checkpoint says they are."""
  return _like(abstract, {
      name: jax.ShapeDtypeStruct(leaf.shape, stored[name].dtype, sharding=leaf.sharding)
      for name, leaf in _by_name(abstract).items()})


def _by_name(tree):
  """The leaves as a flat dict: a checkpoint so depends on names, not on Python classes."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _like(tree, by_name):
  """The inverse of `_by_name`, with the structure of `tree`."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  leaves = [by_name[jax.tree_util.keystr(path, simple=True, separator='/')]
            for path in paths]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)
