"""Places that a config leaves open in its paths, filled in when a study runs.

`{bucket}` is `config.bucket`, the folder or bucket of what is read; `{sweep}`, in an `init_from`,
the folder that holds the workdirs of all cells of a sweep.
"""

from collections.abc import Callable, Iterator
import pathlib
import re
from typing import Any

import ml_collections

from specdistill_jax import storage

BUCKET = '{bucket}'
SWEEP = '{sweep}'


def is_open(path: str | None) -> bool:
  """Whether a path is not yet known."""
  return any(mark in (path or '') for mark in (BUCKET, SWEEP))


def _leaves(section: ml_collections.ConfigDict, path: str = 'config') -> Iterator[tuple]:
  """(section, name, path) of every field that may hold paths."""
  for name in section:
    value = section[name]
    if isinstance(value, ml_collections.ConfigDict):
      yield from _leaves(value, f'{path}.{name}')
    elif isinstance(value, (str, tuple, list)):
      yield section, name, f'{path}.{name}'


def _each(value: Any, change: Callable[[str], str]) -> Any:
  if isinstance(value, str):
    return change(value)
  if isinstance(value, (tuple, list)):
    return type(value)(_each(one, change) for one in value)
  return value


def resolved(config: ml_collections.ConfigDict,
             workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config of a study in `workdir`, its places filled in.

  Raises:
    ValueError: a path names `{bucket}`, and `config.bucket` is None.
  """
  folder = workdir.parent
  if not str(folder).startswith(storage.SCHEME):
    folder = folder.absolute()  # the same study, wherever the command is given
  made = config.copy_and_resolve_references()
  for section, name, path in list(_leaves(made)):
    value = section[name]
    if BUCKET in str(value) and not made.bucket:
      raise ValueError(f'{path} is {value!r} and config.bucket is None; name the folder or bucket '
                       'that holds what is read, as in --config.bucket=gs://my-bucket/inputs')
    filled = _each(value, lambda text: text.replace(SWEEP, str(folder)).replace(
        BUCKET, (made.bucket or '').rstrip('/')))
    if filled != value:
      section[name] = filled
  return made


def may_be(value: Any, expected: Any) -> bool:
  """Whether `value` may be `expected` with its places filled in; of plain JSON values."""
  if isinstance(value, list) and isinstance(expected, list):
    return len(value) == len(expected) and all(map(may_be, value, expected))
  if not isinstance(value, str) or not isinstance(expected, str) or not is_open(expected):
    return value == expected
  pattern = '.*'.join(map(re.escape, re.split(r'\{bucket\}|\{sweep\}', expected)))
  return re.fullmatch(pattern, value) is not None
