"""The ragged cache: random writes and rollbacks against a list per row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdistill_jax.models import cache as cache_lib

SLOTS, KV_HEADS, WIDTH = 24, 2, 3


def _write_all(cache, new_btkh):
  keys = tuple(cache_lib.write_rows(buffer, new_btkh + layer, cache.length_b)
               for layer, buffer in enumerate(cache.keys_bksh))
  values = tuple(cache_lib.write_rows(buffer, -new_btkh - layer, cache.length_b)
                 for layer, buffer in enumerate(cache.values_bksh))
  return cache.replace(keys_bksh=keys, values_bksh=values,
                       length_b=cache.length_b + new_btkh.shape[1])


@pytest.mark.parametrize('batch', [1, 2, 5])
@pytest.mark.parametrize('seed', [0, 1])
def test_random_writes_and_rollbacks_agree_with_lists(batch, seed):
  """Every live slot holds what a Python list a row would hold, after any history."""
  rng = np.random.default_rng(seed)
  cache = cache_lib.init_cache(2, batch, SLOTS, KV_HEADS, WIDTH, jnp.float32)
  write = jax.jit(_write_all)
  rows = [[] for _ in range(batch)]
  for _ in range(60):
    t = int(rng.choice([1, 2, 4]))
    if max(map(len, rows)) + t > SLOTS:
      keep_b = np.array([rng.integers(0, len(row) // 2 + 1) for row in rows])
    else:
      new = rng.normal(size=(batch, t, KV_HEADS, WIDTH)).astype(np.float32)
      cache = write(cache, jnp.asarray(new))
      for row, fresh in zip(rows, new):
        row.extend(fresh)
      keep_b = np.array([rng.integers(max(len(row) - t, 0), len(row) + 1) for row in rows])
    cache = cache.rollback(jnp.asarray(keep_b))
    rows = [row[:keep] for row, keep in zip(rows, keep_b)]
    for index, row in enumerate(rows):
      assert int(cache.length_b[index]) == len(row)
      if row:
        expected = np.stack(row).transpose(1, 0, 2)
        for layer in range(2):
          np.testing.assert_array_equal(
              cache.keys_bksh[layer][index, :, :len(row)], expected + np.float32(layer))
          np.testing.assert_array_equal(
              cache.values_bksh[layer][index, :, :len(row)], -expected - np.float32(layer))


@pytest.mark.parametrize('batch', [1, 4])
def test_random_trees_and_paths_agree_with_lists(batch):
  """A tree is written, one path of it is kept, each row its own; what lay before is untouched."""
  rng = np.random.default_rng(batch)
  cache = cache_lib.init_cache(2, batch, SLOTS, KV_HEADS, WIDTH, jnp.float32)
  write, t = jax.jit(_write_all), 6
  keep = jax.jit(lambda cache, offset_b, path_bt: cache.keep_path(offset_b, path_bt))
  rows = [[] for _ in range(batch)]
  for _ in range(40):
    if max(map(len, rows)) + t > SLOTS:
      rows = [row[:rng.integers(0, 4)] for row in rows]
      cache = cache.rollback(jnp.asarray([len(row) for row in rows]))
    offset_b = cache.length_b
    new = rng.normal(size=(batch, t, KV_HEADS, WIDTH)).astype(np.float32)
    cache = write(cache, jnp.asarray(new))
    # Slots of a path, root first; behind its end stands whatever the walk left there.
    path_bt = np.zeros((batch, 4), np.int32)
    kept_b = rng.integers(1, 5, size=batch)
    for row in range(batch):
      path = [0, *np.sort(rng.choice(np.arange(1, t), size=kept_b[row] - 1, replace=False))]
      path_bt[row, :len(path)] = path
      rows[row].extend(new[row, path])
    cache = keep(cache, offset_b, jnp.asarray(path_bt)).rollback(offset_b + jnp.asarray(kept_b))
    for index, row in enumerate(rows):
      assert int(cache.length_b[index]) == len(row)
      expected = np.stack(row).transpose(1, 0, 2)
      for layer in range(2):
        np.testing.assert_array_equal(
            cache.keys_bksh[layer][index, :, :len(row)], expected + np.float32(layer))
        np.testing.assert_array_equal(
            cache.values_bksh[layer][index, :, :len(row)], -expected - np.float32(layer))


def test_keeping_a_path_moves_its_slots_only():
  cache = cache_lib.init_cache(1, 2, SLOTS, KV_HEADS, WIDTH, jnp.float32)
  slot_bksh = jnp.broadcast_to(jnp.arange(SLOTS, dtype=jnp.float32)[:, None],
                               (2, KV_HEADS, SLOTS, WIDTH))
  cache = cache.replace(keys_bksh=(slot_bksh,), values_bksh=(-slot_bksh,))
  kept = cache.keep_path(jnp.asarray([3, 10]), jnp.asarray([[0, 4, 5], [0, 1, 7]]))
  expected = np.tile(np.arange(SLOTS), (2, 1))
  expected[0, 4:6], expected[1, 12] = [7, 8], 17
  np.testing.assert_array_equal(kept.keys_bksh[0][:, 1, :, 2], expected)
  np.testing.assert_array_equal(kept.values_bksh[0][:, 0, :, 0], -expected)


@pytest.mark.parametrize('batch', [1, 3])
def test_fresh_slots_have_their_tokens_positions(batch):
  """In a tree, siblings share one; all other slots are their own position."""
  offset_b, fresh = [4, 0, SLOTS - 3][:batch], [[5, 6, 6], [1, 1, 2], [20, 21, 21]][:batch]
  found = cache_lib.slot_positions(jnp.asarray(fresh), jnp.asarray(offset_b), SLOTS)
  for row, offset in enumerate(offset_b):
    expected = np.arange(SLOTS)
    expected[offset:offset + 3] = fresh[row]
    np.testing.assert_array_equal(found[row], expected)


def test_a_write_touches_its_own_slots_only():
  cache = cache_lib.init_cache(1, 3, SLOTS, KV_HEADS, WIDTH, jnp.float32)
  offset_b = jnp.asarray([0, 5, SLOTS - 2])
  ones = jnp.ones((3, 2, KV_HEADS, WIDTH))
  written = cache_lib.write_rows(cache.keys_bksh[0], ones, offset_b)
  for row, offset in enumerate([0, 5, SLOTS - 2]):
    assert float(written[row, :, offset:offset + 2].min()) == 1.0
    assert float(written[row].sum()) == 2 * KV_HEADS * WIDTH


def test_cache_keeps_its_dtype():
  cache = cache_lib.init_cache(1, 2, SLOTS, KV_HEADS, WIDTH, jnp.bfloat16)
  written = cache_lib.write_rows(cache.keys_bksh[0], jnp.ones((2, 1, KV_HEADS, WIDTH)),
                                 cache.length_b)
  assert written.dtype == jnp.bfloat16 and cache.num_slots == SLOTS
