"""Key tables: which tensor of a file is which parameter of ours, as data, in both directions.

A table is a tuple of `Entry`. The file's axes are written in the letters that end our
parameter's name, a group of letters being one flattened axis: `query_nhd` is
`self_attn.q_proj.weight` with axes `'nh d'`. Everything else follows: shapes, the part of a
file that a slice of a parameter needs, transposes, and whether a file has what it must have.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import ml_dtypes  # noqa: F401  (gives NumPy bfloat16)
import numpy as np

from specdistill_jax.checkpoints import safetensors_io

SHOWN = 3          # keys named in a refusal
COMPARED_ROWS = 8192  # of two tied tensors, at a time
LAYER = '{l}'
PART = '*'


@dataclasses.dataclass(frozen=True)
class Entry:
  """One parameter's place in a file.

  Attributes:
    key: of the tensor, behind the table's prefix; `{l}` stands for the layer, 0 and up.
    name: path of our parameter; with `{l}` in `key` its first axis is the stack of layers.
    axes: of the tensor: letters of our parameter's name, groups parted by spaces.
    part: (index, count): the tensor holds `count` parameters along the axis `*`.
  """
  key: str
  name: str
  axes: str
  part: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class Table:
  """The tensors of one model.

  Attributes:
    entries: every parameter once.
    prefixes: what may stand before keys; the first is written. A file's own is the one under
      which it has `anchor`.
    anchor: a key that each file has.
    copies: (key, original): a tied tensor that files may repeat, if it is equal.
    fallbacks: (key, other): where a file lacks the first, it equals the second.
    ignored: patterns of tensors that are no weights, such as stored masks.
  """
  entries: tuple[Entry, ...]
  prefixes: tuple[str, ...]
  anchor: str
  copies: tuple[tuple[str, str], ...] = ()
  fallbacks: tuple[tuple[str, str], ...] = ()
  ignored: tuple[str, ...] = ()


class _Place(NamedTuple):
  """A tensor of the file and what it holds: its axes as groups of (letter, size)."""
  entry: Entry
  layer: int | None
  key: str
  groups: tuple[tuple[tuple[str, int], ...], ...]

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(math.prod(size for _, size in group) for group in self.groups)


def by_path(tree: Any) -> dict[str, Any]:
  """Leaves by path, `layers/attention/query_nhd`, as tables name them."""
  return {jax.tree_util.keystr(path, simple=True, separator='/').removesuffix('/value'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _places(table: Table, prefix: str, parameters: dict[str, Any]) -> list[_Place]:
  """Every tensor that a model of these parameters has. Raises where table and model disagree."""
  names = [entry.name for entry in table.entries]
  unknown = [name for name in names if name not in parameters]
  unplaced = [name for name in parameters if name not in names]
  doubled = sorted({name for name in names if names.count(name) > 1})
  if unknown or unplaced or doubled:
    raise ValueError(f'the key table does not fit the model: not in the model: {unknown}, not in '
                     f'the table: {unplaced}, twice in the table: {doubled}')
  places = []
  for entry in table.entries:
    shape = parameters[entry.name].shape
    stacked = LAYER in entry.key
    sizes = dict(zip(_letters(entry), shape[stacked:], strict=True)) | {PART: entry.part[1]}
    groups = tuple(tuple((letter, sizes[letter]) for letter in group)
                   for group in entry.axes.split())
    for layer in range(shape[0]) if stacked else (None,):
      key = _absolute(entry.key, prefix).replace(LAYER, str(layer))
      places.append(_Place(entry, layer, key, groups))
  return places


def _letters(entry: Entry) -> str:
  """The axes of our parameter, without the stack of layers."""
  return entry.name.rpartition('_')[2]


def _absolute(key: str, prefix: str) -> str:
  """A key with its prefix; one that begins with a slash never has one (`/lm_head.weight`)."""
  return key[1:] if key.startswith('/') else prefix + key


def _prefix(table: Table, reader: safetensors_io.Reader) -> str:
  keys = reader.shapes
  for prefix in table.prefixes:
    if prefix + table.anchor in keys:
      return prefix
  raise ValueError(f'the weights in {reader.directory} have no tensor '
                   f'{table.prefixes[0]}{table.anchor}; among their '
                   f'{len(keys)} keys are {", ".join(sorted(keys)[:SHOWN])}: config.json says '
                   'another architecture than the weights')


def _listed(names: Sequence[str]) -> str:
  more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
  return ', '.join(names[:SHOWN]) + more


def check(table: Table, places: list[_Place], prefix: str, reader: safetensors_io.Reader) -> None:
  """Raises a ValueError unless the file holds each tensor of `places` once, and nothing else."""
  wanted = {place.key: place.shape for place in places}
  copies = {_absolute(copy, prefix): _absolute(original, prefix)
            for copy, original in table.copies}
  ignored = [re.compile(pattern) for pattern in table.ignored]
  missing = [f'{key} {list(shape)}' for key, shape in wanted.items() if key not in reader.shapes]
  unused = [f'{key} {list(shape)}' for key, shape in sorted(reader.shapes.items())
            if key not in wanted and key not in copies
            and not any(pattern.search(key) for pattern in ignored)]
  misshapen = [f'{key} is {list(reader.shapes[key])} and must be {list(shape)}'
               for key, shape in wanted.items() if reader.shapes.get(key, shape) != shape]
  told = [f'{what}: {_listed(names)}' for what, names in (
      ('missing', missing), ('unknown', unused), ('misshapen', misshapen)) if names]
  if told:
    raise ValueError(f'the weights in {reader.directory} do not fit the config: '
                     f'{"; ".join(told)}')
  for key in wanted:
    reader.dtype(key)  # refuses quantised weights, which a cast would read as numbers
  for copy, original in copies.items():
    if copy in reader.shapes:
      _check_equal(reader, copy, original)


def _check_equal(reader, copy, original) -> None:
  shapes = reader.shapes[copy], reader.shapes[original]
  if shapes[0] == shapes[1]:
    rows = range(0, shapes[0][0], COMPARED_ROWS)
    parts = ([slice(row, min(row + COMPARED_ROWS, shapes[0][0]))]
             + [slice(0, size) for size in shapes[0][1:]] for row in rows)
    if all(np.array_equal(reader.read(copy, part), reader.read(original, part))
           for part in parts):
      return
  raise ValueError(f'{reader.directory}: the config ties {copy} {list(shapes[0])} to {original} '
                   f'{list(shapes[1])}, but they differ')


def load(table: Table, reader: safetensors_io.Reader, abstract: Any, shardings: Any, *,
         dtype: str | None = 'float32') -> Any:
  """Reads a model onto a mesh: each device's slice of each parameter, and nothing wider.

  Args:
    abstract: the model as shapes; its structure is that of the result.
    shardings: of the parameters, a tree of the same structure.
    dtype: of the parameters; None keeps that of the file.

  Returns:
    `abstract` with arrays.

  Raises:
    ValueError: a tensor is missing, unknown, misshapen, or tied to one that it does not equal.
  """
  prefix = _prefix(table, reader)
  parameters = by_path(abstract)
  places = _places(table, prefix, parameters)
  others = {_absolute(key, prefix): _absolute(other, prefix) for key, other in table.fallbacks}
  places = [place if place.key in reader.shapes or place.key not in others
            else place._replace(key=others[place.key]) for place in places]
  check(table, places, prefix, reader)
  layouts = by_path(shardings)
  by_name = {name: [place for place in places if place.entry.name == name]
             for name in parameters}
  leaves = []
  for name, leaf in parameters.items():
    kept = np.dtype(dtype or reader.dtype(by_name[name][0].key))
    leaves.append(_on_mesh(by_name[name], reader, leaf.shape, kept, layouts[name]))
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _on_mesh(places, reader, shape, dtype, layout) -> jax.Array:
  """One parameter, device by device: the host never holds more than one device's slice."""
  arrays, made = [], {}
  for device, index in layout.addressable_devices_indices_map(shape).items():
    bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
    if bounds in made:
      arrays.append(jax.device_put(made[bounds], device))  # from its replica, not from disk
    else:
      arrays.append(jax.device_put(_slice(places, reader, bounds, dtype), device))
      made[bounds] = jax.block_until_ready(arrays[-1])
  return jax.make_array_from_single_device_arrays(shape, layout, arrays)


def _slice(places: list[_Place], reader, bounds, dtype) -> np.ndarray:
  """The part of a parameter at `bounds`, (start, stop) an axis, assembled layer by layer."""
  stacked = places[0].layer is not None
  out = np.empty([stop - start for start, stop in bounds], dtype)
  if not stacked:
    out[...] = _read(places[0], reader, bounds)
    return out
  for place in places:
    if bounds[0][0] <= place.layer < bounds[0][1]:
      out[place.layer - bounds[0][0]] = _read(place, reader, bounds[1:])
  return out


def _read(place: _Place, reader, bounds) -> np.ndarray:
  """One layer's part of a parameter, in our axes."""
  letters = _letters(place.entry)
  wanted = dict(zip(letters, bounds, strict=True))
  wanted[PART] = (place.entry.part[0], place.entry.part[0] + 1)
  index, shape, inner = [], [], []
  for group in place.groups:
    # The leading letter of a group cuts it contiguously; the others are read whole.
    (lead, _), rest = group[0], group[1:]
    unit = math.prod(size for _, size in rest)
    start, stop = wanted[lead]
    index.append(slice(start * unit, stop * unit))
    shape += [stop - start, *(size for _, size in rest)]
    inner += [slice(None), *(slice(*wanted[letter]) for letter, _ in rest)]
  array = reader.read(place.key, index).reshape(shape)[tuple(inner)]
  order = [letter for group in place.groups for letter, _ in group]
  if PART in order:
    array = array.squeeze(order.index(PART))
    order.remove(PART)
  return array.transpose([order.index(letter) for letter in letters])


def tensors(table: Table, module: Any, dtype: str | None = None
            ) -> Iterator[safetensors_io.Tensor]:
  """A model's tensors as its file has them, each fetched from the devices in its turn.

  Args:
    dtype: of the file; None keeps that of the parameters.
  """
  parameters = by_path(module)
  shared: dict[str, list[_Place]] = {}
  for place in _places(table, table.prefixes[0], parameters):
    shared.setdefault(place.key, []).append(place)
  for key, places in shared.items():
    entry = places[0].entry
    kept = np.dtype(dtype or parameters[entry.name].dtype)
    yield safetensors_io.Tensor(
        key, places[0].shape, kept,
        lambda places=places, kept=kept: _assemble(places, parameters).astype(kept))


def _assemble(places: list[_Place], parameters) -> np.ndarray:
  """A tensor of the file from its parts."""
  parts = []
  for place in sorted(places, key=lambda place: place.entry.part):
    array = _to_host(parameters[place.entry.name], place.layer)
    letters, order = _letters(place.entry), [
        letter for group in place.groups for letter, _ in group]
    array = array.transpose([letters.index(letter) for letter in order if letter != PART])
    if PART in order:
      array = np.expand_dims(array, order.index(PART))
    parts.append(array)
  if len(parts) != places[0].entry.part[1]:
    raise ValueError(f'{places[0].key} is made of {places[0].entry.part[1]} parameters, and the '
                     f'table names {len(parts)}')
  if len(parts) > 1:
    axis = [letter for group in places[0].groups for letter, _ in group].index(PART)
    return np.concatenate(parts, axis).reshape(places[0].shape)
  return parts[0].reshape(places[0].shape)


def _to_host(array: jax.Array, layer: int | None) -> np.ndarray:
  """An array, or one layer of it, on this host, wherever its slices are."""
  if layer is not None:
    array = jax.lax.index_in_dim(array, layer, keepdims=False)
  if not array.is_fully_addressable:
    array = multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(array)
