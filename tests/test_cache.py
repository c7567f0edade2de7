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
