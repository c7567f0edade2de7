"""A key/value cache in which each row advances by its own number of tokens, and goes back.

After verification every row of a batch has accepted a different number of tokens, so rows
live at different lengths. The cache keeps one length a row:

  write     puts `t` new entries at each row's own offset, and advances by t;
  rollback  is a smaller length: entries past it are stale, never read (masks see only slots
            below a query's own position) and overwritten by the next write;
  keep_path moves the entries of one path of a tree to where the tree was written, each row
            its own path; keys were rotated for the positions that they keep;
  slots     past the buffer's end are never reached: whoever sizes the buffer leaves room for
            the longest write (`write` would otherwise be clamped onto live entries).

Layers hold separate arrays (a tuple, not a stack): a stacked cache is copied at each step of a
decode loop. The slot axis is next to the head width, the layout in which attention reads it.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from specdistill_jax import sharding


@struct.dataclass
class KVCache:
  """Keys and values of every layer, with a length for every row.

  Attributes:
    keys_bksh: one array a layer.
    values_bksh: one array a layer.
    length_b: int32, live slots of each row.
    memory: what an encoder read of the prompts (`structs.Start.memory`); None in a decoder.
  """
  keys_bksh: tuple[jax.Array, ...]
  values_bksh: tuple[jax.Array, ...]
  length_b: jax.Array
  memory: Any = None

  @property
  def num_slots(self) -> int:
    return self.keys_bksh[0].shape[2]

  def rollback(self, length_b: jax.Array) -> 'KVCache':
    """The same cache with its rows cut to `length_b`, which must not exceed the present one."""
    return self.replace(length_b=length_b.astype(jnp.int32))

  def keep_path(self, offset_b: jax.Array, path_bt: jax.Array) -> 'KVCache':
    """The entry at slot `offset + path[i]` goes to slot `offset + i`, in every layer.

    `path_bt` is int32 and says where in what was written last; all of it is read before any of
    it moves. Lengths stay.
    """
    keep = lambda buffers: tuple(move_rows(one, offset_b, path_bt) for one in buffers)
    return self.replace(keys_bksh=keep(self.keys_bksh), values_bksh=keep(self.values_bksh))


def init_cache(num_layers: int, batch: int, num_slots: int, num_kv_heads: int,
               head_dim: int, dtype: jnp.dtype, memory: Any = None) -> KVCache:
  """An empty cache; `num_slots` must cover the longest row plus the longest write."""
  shape = (batch, num_kv_heads, num_slots, head_dim)
  zeros = lambda: tuple(sharding.constrain(jnp.zeros(shape, dtype), 'bksh')
                        for _ in range(num_layers))
  return KVCache(keys_bksh=zeros(), values_bksh=zeros(),
                 length_b=jnp.zeros((batch,), jnp.int32), memory=memory)


def write_rows(buffer_bksh: jax.Array, new_btkh: jax.Array, offset_b: jax.Array) -> jax.Array:
  """Writes `t` entries into every row at that row's own offset."""
  new_bkth = jnp.swapaxes(new_btkh, 1, 2).astype(buffer_bksh.dtype)
  write = lambda buffer_ksh, new_kth, offset: jax.lax.dynamic_update_slice(
      buffer_ksh, new_kth, (0, offset, 0))
  if buffer_bksh.shape[0] == 1:  # a plain slice update; the batched one lowers to a scatter
    return write(buffer_bksh[0], new_bkth[0], offset_b[0])[None]
  return jax.vmap(write)(buffer_bksh, new_bkth, offset_b)


def move_rows(buffer_bksh: jax.Array, offset_b: jax.Array, path_bt: jax.Array) -> jax.Array:
  """Gathers slots `offset + path` of every row and writes them from `offset` on."""
  take = lambda buffer_ksh, slot_t: buffer_ksh[:, slot_t].swapaxes(0, 1)
  slot_bt = offset_b[:, None] + path_bt
  if buffer_bksh.shape[0] == 1:  # see `write_rows`
    moved_btkh = take(buffer_bksh[0], slot_bt[0])[None]
  else:
    moved_btkh = jax.vmap(take)(buffer_bksh, slot_bt)
  return write_rows(buffer_bksh, moved_btkh, offset_b)


def slot_positions(positions_bt: jax.Array, offset_b: jax.Array, num_slots: int) -> jax.Array:
  """The text position of what each slot holds while `t` tokens are written, int32 `[b, s]`.

  A slot's own number, but for the fresh ones: in a tree, positions fall behind slots.
  """
  slot_s = jnp.arange(num_slots, dtype=positions_bt.dtype)
  write = lambda new_t, offset: jax.lax.dynamic_update_slice(slot_s, new_t, (offset,))
  if positions_bt.shape[0] == 1:  # see `write_rows`
    return write(positions_bt[0], offset_b[0])[None]
  return jax.vmap(write)(positions_bt, offset_b)
