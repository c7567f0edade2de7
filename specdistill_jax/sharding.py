"""Every sharding word of the project: the mesh, and one table from axis letters to mesh axes.

A parameter's name ends in its axes (`query_nhd`), so its layout follows from its name: each
letter is looked up in one of `LAYOUTS`. Two models on one mesh may follow different ones: a
large teacher is `sharded` while its small student is `replicated`. A leading axis that the name
doesn't spell is the stack of layers. A dimension that the mesh axis doesn't divide stays whole,
as a two-head model on four chips should still run; nothing else is ever left unsharded
silently.

Activations follow `ACTIVATIONS`, wherever a model says so (`constrain`): rows are spread over
data and fsdp, heads, MLP and vocabulary over tensor. So caches are laid out like the heads that
fill them, and logits stay split by vocabulary through the whole loss.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ('data', 'fsdp', 'tensor')
_AUTO = (AxisType.Auto,) * len(AXES)

# Letter of the shape legend (structs.py) -> mesh axis. Letters that are not here stay whole.
_HEADS = dict(n='tensor', k='tensor', f='tensor', v='tensor', w='tensor')
LAYOUTS = {
    'sharded': dict(d='fsdp', **_HEADS),  # gathered layer by layer over fsdp (ZeRO-3)
    'tensor': _HEADS,                     # no gathering: for decoding, and for small students
    'replicated': {},
}
DEFAULT_LAYOUT = 'sharded'
ROWS = ('data', 'fsdp')
ACTIVATIONS = dict(b=ROWS, **_HEADS)
BY_VOCABULARY = dict(_HEADS, v=('fsdp', 'tensor'))  # in a loop over parts of the rows


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
  slices = len({getattr(device, 'slice_index', None) or 0 for device in devices})
  if slices == 1:
    return jax.make_mesh(shape, AXES, axis_types=_AUTO, devices=devices)
  if shape[0] % slices:
    raise ValueError(f'mesh: data={shape[0]} on {slices} slices; it must be a multiple of their '
                     'number: only data may go over the network between them')
  between = (slices, 1, 1)
  return Mesh(mesh_utils.create_hybrid_device_mesh(
      (shape[0] // slices, *shape[1:]), between, devices=devices), AXES, axis_types=_AUTO)


def regrouped(mesh: Mesh, tensor: int | None) -> Mesh:
  """The devices of a mesh, in their order, `tensor` of them sharing heads; fsdp takes the rest.

  A decode loop reads all weights once a token: what training gathers over fsdp costs it more
  than sums over tensor. None is the mesh as it is.
  """
  if tensor is None:
    return mesh
  others = mesh.shape['fsdp'] * mesh.shape['tensor']
  if others % tensor:
    raise ValueError(f'distill.rollout.tensor is {tensor}; it must divide mesh.fsdp x mesh.tensor, '
                     f'{others}')
  return Mesh(mesh.devices.reshape(mesh.shape['data'], others // tensor, tensor), AXES,
              axis_types=_AUTO)


def laid_out(tree: Any, mesh: Mesh, layout: str = DEFAULT_LAYOUT) -> Any:
  """A tree of arrays on a mesh of the same devices in the same order."""
  return jax.jit(lambda x: x, out_shardings=parameter_shardings(tree, mesh, layout))(tree)


def _parameter_name(path: tuple[Any, ...]) -> str:
  """The innermost attribute or key that names axes: `.layers.query_nhd.value` -> query_nhd."""
  for entry in reversed(path):
    name = getattr(entry, 'name', None) or getattr(entry, 'key', None)
    if isinstance(name, str) and '_' in name and name.rsplit('_', 1)[1].isalpha():
      return name
  return ''


def axes(path: tuple[Any, ...]) -> str:
  """The letters that end a leaf's name: `.layers.query_nhd.value` -> nhd; '' without any."""
  return _parameter_name(path).rpartition('_')[2]


def fitted(letters: str, shape: tuple[int, ...], rules: dict[str, Any], mesh: Any
            ) -> list[Any]:
  """A mesh axis, several or None for each dimension; none twice, and none that doesn't divide."""
  entries: list[Any] = []
  for letter, size in zip(letters, shape, strict=True):
    axis = rules.get(letter)
    ways = int(np.prod([mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis or ())]))
    entries.append(axis if axis is not None and axis not in entries and size % ways == 0 else None)
  return entries


def _spec(path: tuple[Any, ...], leaf: Any, mesh: Mesh, layout: str) -> PartitionSpec:
  letters = axes(path)
  stacked = len(leaf.shape) - len(letters)
  if not letters or stacked not in (0, 1):
    return PartitionSpec()  # a scalar, or an optimizer's factored moment: small, replicated
  return PartitionSpec(*[None] * stacked,
                       *fitted(letters, leaf.shape[stacked:], LAYOUTS[layout], mesh))


def parameter_shardings(tree: Any, mesh: Mesh, layout: str = DEFAULT_LAYOUT) -> Any:
  """NamedShardings for a tree of (abstract) arrays, from the letters that end their names.

  Works on a module and on any optimizer state that mirrors it. `layout` is one of `LAYOUTS`.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh, layout)), tree)


def decoding_layout(which: str, layout: str) -> str:
  """That of a target or draft in decode loops, which gather nothing over fsdp.

  A target is split by its heads. A draft too, unless it is replicated in training: small steps
  without a reduction beat smaller steps with two a layer.
  """
  return 'replicated' if which == 'draft' and layout == 'replicated' else 'tensor'


def constrain(x: jax.Array, letters: str) -> jax.Array:
  """Lays an activation out by its axes (`'btv'`) on the mesh in context; without one, as it is.

  Gradients are laid out like their values.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  rules = ACTIVATIONS
  if 'data' in mesh.manual_axes:  # under `row_sharding.over_rows`
    rules = _HEADS if 'fsdp' in mesh.manual_axes else BY_VOCABULARY
  return jax.lax.with_sharding_constraint(
      x, PartitionSpec(*fitted(letters, x.shape, rules, mesh)))


def is_matrix(path: tuple[Any, ...]) -> bool:
  """Neither norm nor bias. A stacked norm has two axes as well, so the name decides."""
  return len(axes(path)) > 1 and 'bias' not in _parameter_name(path)


def matrices_in(tree: Any, dtype: Any) -> Any:
  """The tree with its matrices in `dtype`; norms and biases are few and stay as they are."""
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf.astype(dtype) if is_matrix(path) else leaf, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch, spread over data and fsdp: both hold different rows."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Rows of a batch that this process's devices hold, ascending; all rows on one process.

  Two processes hold the same rows where a mesh axis that doesn't spread rows spans both.
  """
  held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  every = np.arange(batch_size)
  return np.unique(np.concatenate([every[index] for index in held.values()]))


def put_rows(tree: Any, mesh: Mesh, batch_size: int) -> Any:
  """`local_rows` of a batch, as host arrays `[b / processes, ...]`, to the global batch."""
  held, layout = local_rows(mesh, batch_size), batch_sharding(mesh)
  def put(local):
    def piece(index):
      rows = np.arange(batch_size)[index[0]]
      return local[(np.searchsorted(held, rows), *index[1:])]
    return jax.make_array_from_callback((batch_size, *local.shape[1:]), layout, piece)
  return jax.tree.map(put, tree)


def put(tree: Any, layout: NamedSharding) -> Any:
  """Host arrays, the same in every process, laid out; unlike device_put compares nothing."""
  return jax.tree.map(lambda x: jax.make_array_from_callback(
      np.shape(x), layout, lambda index: np.asarray(x)[index]), tree)


def fetch(tree: Any) -> Any:
  """To host arrays, whole in every process, wherever the pieces are; all processes call it."""
  def whole(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return multihost_utils.process_allgather(x, tiled=True)
    return x
  return jax.device_get(jax.tree.map(whole, tree))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def rows_per_step(mesh: Mesh) -> int:
  """The number that a global batch size must be a multiple of."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def sharded_init(init: Callable[..., Any], mesh: Mesh, *args: Any,
                 layout: str = DEFAULT_LAYOUT) -> Any:
  """Runs `init(*args)` so that each device only ever holds its own slice of the result."""
  shardings = parameter_shardings(jax.eval_shape(init, *args), mesh, layout)
  return jax.jit(init, out_shardings=shardings)(*args)
