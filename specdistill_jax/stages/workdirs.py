"""The directory of a study: which config it belongs to, and which stages have finished in it."""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import secrets
import time
from typing import Any

import ml_collections

from specdistill_jax import processes
from specdistill_jax import storage
from specdistill_jax.losses import specs
from specdistill_jax.stages import places
from specdistill_jax.training import preemption

SHOWN_DIFFERENCES = 3

_own: dict[pathlib.Path, str] = {}  # file of attempts -> the name of this launch in it


def write_atomically(path: pathlib.Path, document: dict[str, Any]) -> None:
  """Writes JSON so that a kill leaves the old file or the new one, never half of one."""
  storage.write(path, json.dumps(document, indent=2) + '\n')


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """A config as JSON gives it back: plain dicts, lists for tuples, references resolved.

  Left out is what the report is asked and no measurement depends on, so that a finished study
  can be asked again, and the bucket, which the paths name. Added are the lines of your own
  objectives, so that a study goes on only with the functions that it began with.
  """
  document = json.loads(json.dumps(config.to_dict()))
  document.pop('bucket', None)
  if document.get('evaluate'):
    document['evaluate'].pop('max_quality_drop', None)
  distill = document.get('distill') or {}
  for spec in filter(specs.is_yours, (distill.get('objective'), *distill.get('also', ()))):
    name = specs.parse(spec)[0]
    lines = specs.source(name).splitlines()
    distill.setdefault('functions', {})[name] = {
        str(number): line for number, line in enumerate(lines, start=1)}
  return document


def stored_config(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The config of the study that `workdir` holds, as `to_json` wrote it; None if it holds none."""
  path = workdir / 'config.json'
  return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None


def done_path(workdir: pathlib.Path, stage: str) -> pathlib.Path:
  """The file that says that a stage has finished."""
  return workdir / 'done' / f'{stage}.json'


def unfinished(model: pathlib.Path) -> tuple[pathlib.Path, str] | None:
  """Workdir and stage, if a model's folder is a study's and the stage that makes it isn't done.

  Its file `model.json` is written when training begins, and its checkpoints before it ends.
  """
  for workdir, stage in ((model.parent, model.name), (model.parent.parent, model.parent.name)):
    if stage in ('target', 'draft', 'distill') and (workdir / 'config.json').exists():
      return None if done_path(workdir, stage).exists() else (workdir, stage)
  return None


def attempts_path(workdir: pathlib.Path, stage: str) -> pathlib.Path:
  """The file with the seconds of each attempt at a stage."""
  return workdir / 'attempts' / f'{stage}.json'


def attempts(workdir: pathlib.Path, stage: str) -> list[float | None]:
  """Seconds of each attempt at a stage, in order; None: it was killed, and nobody knows."""
  return _told(attempts_path(workdir, stage))['seconds']


def _told(path: pathlib.Path) -> dict[str, Any]:
  """What a file of attempts says: seconds of each, and the launch that began the last."""
  return json.loads(path.read_text(encoding='utf-8')) if path.exists() else dict(seconds=[])


@contextlib.contextmanager
def attempt(workdir: pathlib.Path, stage: str) -> Iterator[None]:
  """An attempt at a stage, which leaves how long it took whichever way it ends.

  A stage goes on from what earlier attempts have left, so its cost is that of all of them. To
  be entered by one process.
  """
  path, own = attempts_path(workdir, stage), secrets.token_hex(8)
  number = len(attempts(workdir, stage))

  def leave(seconds, **launch):  # beside what another launch may have said since
    told = _told(path)
    told['seconds'][number:number + 1] = [seconds]
    write_atomically(path, dict(stage=stage) | told | launch)

  leave(None, launch=own)  # what stays if it is killed
  _own[path] = own
  started = time.perf_counter()
  try:
    yield
  finally:
    with contextlib.suppress(OSError):  # as in record_failure: another error may be on its way
      leave(round(time.perf_counter() - started, 3))
    del _own[path]


def check_alone(workdir: pathlib.Path, stage: str) -> None:
  """Before something is added to what a stage has made, by the process that adds it.

  Two launches on one workdir would write into each other's files. The later one goes on from what
  the earlier has saved, as after a kill; the earlier one stops here.

  Raises:
    preemption.Superseded: another launch has begun this stage since.
  """
  if _is_superseded(workdir, stage):
    _give_way(workdir, stage)


def check_alone_together(workdir: pathlib.Path, stage: str) -> None:
  """`check_alone` where all processes are at the same place: all of them stop, or none."""
  if processes.agree('another launch', lambda: _is_superseded(workdir, stage)):
    _give_way(workdir, stage)


def _is_superseded(workdir, stage) -> bool:
  path = attempts_path(workdir, stage)
  return path in _own and _told(path).get('launch') != _own[path]


def _give_way(workdir, stage) -> None:
  raise preemption.Superseded(
      f'another launch has begun the stage {stage!r} in {workdir} since this one did; this one '
      'stops and leaves the workdir to it: give each launch a --workdir of its own')


def write_done(workdir: pathlib.Path, stage: str) -> None:
  """Says that a stage has finished, and in how many seconds over all attempts, if that is known."""
  seconds = attempts(workdir, stage)
  write_atomically(done_path(workdir, stage), dict(
      stage=stage, attempts=len(seconds),
      wall_seconds=None if None in seconds else round(sum(seconds), 3)))


def failed_path(workdir: pathlib.Path) -> pathlib.Path:
  """The file that says which stage failed last, and of what; gone once a stage has finished."""
  return workdir / 'failed.json'


def record_failure(workdir: pathlib.Path, stage: str, error: BaseException) -> None:
  """Leaves the trace of a failure; says nothing of its own where that can't be written."""
  with contextlib.suppress(OSError):
    write_atomically(failed_path(workdir), dict(
        stage=stage, error=type(error).__name__, message=' '.join(str(error).split())))


def forget_failure(workdir: pathlib.Path) -> None:
  failed_path(workdir).unlink(missing_ok=True)


def differences(old: Any, new: Any, path: str = '') -> list[str]:
  """Leaves that differ, as 'a.b is 1 there and 2 here'; to have no value is as to be absent."""
  if isinstance(old, dict) and isinstance(new, dict):
    names = [name for name in {**old, **new}
             if old.get(name) is not None or new.get(name) is not None]
    return [line for name in names for line in differences(
        old.get(name, 'absent'), new.get(name, 'absent'), f'{path}.{name}' if path else name)]
  return [] if places.may_be(old, new) else [f'{path} is {old!r} there and {new!r} here']


def check(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Makes sure that `workdir` is free, or belongs to this very config; touches nothing.

  It is free as long as what it was begun with has failed before anything was made.

  Raises:
    ValueError: it is a file, or holds a study of another config.
    OSError: it is in a bucket that can't be read.
  """
  storage.check_readable(workdir)
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f'workdir {workdir} is a file; it must be a directory')
  path = workdir / 'config.json'
  if not path.exists():
    return
  try:
    stored = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}); use another workdir') from error
  found = differences(stored, to_json(config))
  if found and not _is_unused(workdir):
    unseen = len(found) - SHOWN_DIFFERENCES
    more = f', and {unseen} more' if unseen > 0 else ''
    raise ValueError(f'{workdir} holds a study of another config: '
                     f'{"; ".join(found[:SHOWN_DIFFERENCES])}{more}; use another workdir')


def _is_unused(workdir: pathlib.Path) -> bool:
  found = {path.name for path in workdir.iterdir()}
  return 'failed.json' in found and found <= {'failed.json', 'config.json', 'attempts'}


def check_writable(workdir: pathlib.Path) -> None:
  """Makes `workdir` and writes a file. Raises OSError, one sentence, if that can't be done."""
  try:
    storage.check_writable(workdir)
  except OSError as error:
    raise OSError(f'workdir {workdir} can\'t be written: {error}; free some room, or '
                  'name another --workdir') from error


def _bytes_in(directory: pathlib.Path) -> int:
  """Of all files; leftovers of a save that was killed are being removed meanwhile."""
  total = 0
  for folder, _, names in os.walk(directory):  # forgives folders that vanish, as rglob doesn't
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        total += os.stat(os.path.join(folder, name)).st_size
  return total


def check_room(directory: pathlib.Path, state: Any, keep: int) -> None:
  """Compares the free space, where it has a bound, with what the checkpoints of a run will take.

  Args:
    directory: of the run.
    state: arrays, or their shapes, of one checkpoint.
    keep: checkpoints that stay; one more is there while the next is written.

  Raises:
    OSError: one sentence with both numbers.
  """
  if not processes.is_first() or (free := storage.free_bytes(directory)) is None:
    return
  import jax  # pylint: disable=g-import-not-at-top  (main imports this file, and is light)
  one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  held = _bytes_in(directory)
  needed = (keep + 1) * one - held
  if needed > free:
    raise OSError(f'{directory} needs {needed / 1e9:.3g} GB more for {keep} + 1 checkpoints of '
                  f'{one / 1e9:.3g} GB, and its disk has {free / 1e9:.3g} GB free; free some '
                  'room, lower train.keep_checkpoints, or name another --workdir')


def claim(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Makes `workdir` and its `config.json`, where they are not there yet, for all processes."""
  path, document = workdir / 'config.json', to_json(config)
  if processes.is_first() and (not path.exists() or differences(
      json.loads(path.read_text(encoding='utf-8')), document)):
    check_writable(workdir)
    write_atomically(path, document)
    forget_failure(workdir)  # of another config; without it, nobody else takes the workdir for free
  processes.meet('workdir')
  if not path.exists():
    raise ValueError(f'process {processes.index()} does not see {path}, which process 0 wrote: '
                     '--workdir must be on a disk, or in a bucket, that all processes share')
