"""Every sharding word of the project: the mesh, and one table from axis letters to mesh axes.

A parameter's name ends in its axes (`query_nhd`), so its layout follows from its name: each
letter is looked up in `RULES`. A leading axis that the name doesn't spell is the stack of
layers. A dimension that the mesh axis doesn't divide stays whole, as a two-head model on four
chips should still run; nothing else is ever left unsharded silently.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ('data', 'fsdp', 'tensor')

# Letter of the shape legend (structs.py) -> mesh axis. Letters that are not here stay whole.
RULES = {
    'd': 'fsdp',
    'n': 'tensor',
    'k': 'tensor',
    'f': 'tensor',
    'v': 'tensor',
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1,
              devices: list[Any] | None = None) -> Mesh:
  """A mesh over all devices with Auto axes; one size may be -1, meaning what is left."""
  devices = jax.devices() if devices is None else devices
  sizes = dict(data=data, fsdp=fsdp, tensor=tensor)
  open_axes = [axis for axis, size in sizes.items() if size == -1]
  if len(open_axes) > 1:
    raise ValueError(f'mesh: only one axis may be -1, but {" and ".join(open_axes)} are')
  fixed = int(np.prod([size for size in sizes.values() if size != -1]))
  if open_axes:
    sizes[open_axes[0]] = len(devices) // fixed if fixed > 0 else 0
  shape = tuple(sizes[axis] for axis in AXES)
  if min(shape) < 1 or int(np.prod(shape)) != len(devices):
    raise ValueError(
        f'mesh: data={data}, fsdp={fsdp}, tensor={tensor} does not fit {len(devices)} devices; '
        'the product of the three must be the number of devices (-1 fills up one of them)')
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _parameter_name(path: tuple[Any, ...]) -> str:
  """The innermost attribute or key that names axes: `.layers.query_nhd.value` -> query_nhd."""
  for entry in reversed(path):
    name = getattr(entry, 'name', None) or getattr(entry, 'key', None)
    if isinstance(name, str) and '_' in name and name.rsplit('_', 1)[1].isalpha():
      return name
  return ''


def _spec(path: tuple[Any, ...], leaf: Any, mesh: Mesh) -> PartitionSpec:
  axes = _parameter_name(path).rpartition('_')[2]
  stacked = len(leaf.shape) - len(axes)
  if not axes or stacked not in (0, 1):
    return PartitionSpec()  # a scalar, or an optimizer's factored moment: small, replicated
  entries: list[str | None] = [None] * stacked
  for letter, size in zip(axes, leaf.shape[stacked:]):
    axis = RULES.get(letter)
    fits = axis is not None and axis not in entries and size % mesh.shape[axis] == 0
    entries.append(axis if fits else None)
  return PartitionSpec(*entries)


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
  """NamedShardings for a tree of (abstract) arrays, from the letters that end their names.

  Works on a module and on any optimizer state that mirrors it.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch, spread over data and fsdp: both hold different rows."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def rows_per_step(mesh: Mesh) -> int:
  """The number that a global batch size must be a multiple of."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def sharded_init(init: Callable[..., Any], mesh: Mesh, *args: Any) -> Any:
  """Runs `init(*args)` so that each device only ever holds its own slice of the result."""
  shardings = parameter_shardings(jax.eval_shape(init, *args), mesh)
  return jax.jit(init, out_shardings=shardings)(*args)
