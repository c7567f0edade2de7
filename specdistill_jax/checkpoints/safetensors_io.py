"""Safetensors files, single or in shards: read by slices, written a shard at a time.

Nothing here ever unpickles: a directory that holds only PyTorch's pickled weights is refused.
"""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import json
import pathlib
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

SINGLE_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'
PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt')
MAX_SHARD_BYTES = 5_000_000_000
# Safetensors' name of a dtype -> NumPy's. `ml_dtypes`, beneath JAX, brings bfloat16.
DTYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16', 'F64': 'float64'}


class Tensor(NamedTuple):
  """A tensor to be written: `fetch()` gives its array when its turn comes."""
  key: str
  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[], np.ndarray]


class Reader:
  """The tensors of a directory, opened but not read.

  Attributes:
    shapes: of every tensor, by key.
  """

  def __init__(self, directory: pathlib.Path):
    """Opens every shard; raises ValueError where weights are missing, cut or contradictory."""
    self.directory = directory
    self._stack = contextlib.ExitStack()
    self._slices = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    held_by: dict[str, str] = {}
    names, index = _files(directory)
    for name in names:
      file = self._open(directory / name)
      for key in file.keys():
        if key in held_by:
          raise ValueError(f'{directory}: the tensor {key} is doubled, in {held_by[key]} and '
                           f'in {name}')
        held_by[key] = name
        self._slices[key] = file.get_slice(key)
        self.shapes[key] = tuple(self._slices[key].get_shape())
    wrong = sorted(key for key in index if held_by.get(key) != index[key])
    if wrong:
      found = f'in {held_by[wrong[0]]}' if wrong[0] in held_by else 'nowhere'
      raise ValueError(f'{directory / INDEX_FILE} says that {wrong[0]} is in {index[wrong[0]]}, '
                       f'and it is {found}{_more(wrong)}')

  def _open(self, path):
    try:
      return self._stack.enter_context(safetensors.safe_open(path, 'numpy'))
    except FileNotFoundError:
      raise ValueError(f'{path} is missing, and {INDEX_FILE} names it') from None
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(f'{path} is truncated or no safetensors file ({error}); fetch it again'
                       ) from error

  def __enter__(self) -> 'Reader':
    return self

  def __exit__(self, *_) -> None:
    self._slices.clear()
    self._stack.close()

  def dtype(self, key: str) -> str:
    """NumPy's name of a tensor's dtype. Raises ValueError where it is not a float."""
    name = self._slices[key].get_dtype()
    if name not in DTYPES:
      raise ValueError(f'{self.directory}: {key} has the dtype {name}; weights must be '
                       f'{", ".join(DTYPES)} (quantised checkpoints are not read)')
    return DTYPES[name]

  def read(self, key: str, index: Sequence[slice]) -> np.ndarray:
    """The part of a tensor at `index`, slices of step 1; only that part leaves the disk."""
    return self._slices[key][tuple(index)] if index else self._slices[key][...]


def _files(directory: pathlib.Path) -> tuple[list[str], dict[str, str]]:
  """Names of the weight files, and what the index says about keys (empty without one)."""
  index_path = directory / INDEX_FILE
  if index_path.is_file():
    try:
      index = json.loads(index_path.read_text(encoding='utf-8'))['weight_map']
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(f'{index_path} is no index of safetensors ({error!r})') from error
    return sorted(set(index.values())), index
  if (directory / SINGLE_FILE).is_file():
    return [SINGLE_FILE], {}
  pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
  if pickles:
    raise ValueError(f'{directory} holds pickled weights only ({pickles[0]}), which can run any '
                     'code when they are read, so they are refused; save the model as '
                     'safetensors')
  raise ValueError(f'{directory} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}')


def _more(names: Sequence[str]) -> str:
  return f', and {len(names) - 1} more like it' if len(names) > 1 else ''


def write(directory: pathlib.Path, tensors: Iterable[Tensor], *,
          max_shard_bytes: int = MAX_SHARD_BYTES, write_files: bool = True) -> None:
  """Writes tensors in their order, in shards of at most `max_shard_bytes` (or one tensor).

  Host memory holds one shard. With `write_files` False tensors are fetched and dropped, which
  is what all processes but the first do: fetching a sharded array takes all of them.
  """
  shards = _pack(list(tensors), max_shard_bytes)
  index, total = {}, 0
  for number, shard in enumerate(shards, start=1):
    name = (SINGLE_FILE if len(shards) == 1
            else f'model-{number:05d}-of-{len(shards):05d}.safetensors')
    arrays = {}
    for tensor in shard:
      array = tensor.fetch()
      if write_files:
        arrays[tensor.key] = np.ascontiguousarray(array)
      index[tensor.key] = name
      total += _bytes(tensor)
    if write_files:
      # The readers of PyTorch refuse files without this entry.
      safetensors.numpy.save_file(arrays, directory / name, metadata={'format': 'pt'})
  if write_files and len(shards) > 1:
    (directory / INDEX_FILE).write_text(json.dumps(
        dict(metadata=dict(total_size=total), weight_map=index), indent=2) + '\n')


def _bytes(tensor: Tensor) -> int:
  return int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize


def _pack(tensors: list[Tensor], limit: int) -> list[list[Tensor]]:
  shards, filled = [[]], 0
  for tensor in tensors:
    if shards[-1] and filled + _bytes(tensor) > limit:
      shards.append([])
      filled = 0
    shards[-1].append(tensor)
    filled += _bytes(tensor)
  return shards
