"""The layers of T5: relative positions as a bias, attention without scaling, two kinds of block.

`config` is a `t5.T5Config` throughout. Raffel et al. 2020, arXiv 1910.10683.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from specdistill_jax.models import cache as cache_lib
from specdistill_jax.models import decoder_layers
from specdistill_jax.models import layers


def buckets_by_distance(num_buckets: int, max_distance: int) -> np.ndarray:
  """Bucket of the distances 0 to `max_distance`, which stands for all beyond it.

  The first half of the buckets holds single distances; the second half grows logarithmically
  (arXiv 1910.10683, section 2.1). Computed on the host, so that no rounding of a float32
  logarithm on some device moves a boundary.
  """
  exact = num_buckets // 2
  distance = np.arange(max_distance + 1)
  growth = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact)
  logarithmic = exact + np.floor(growth * (num_buckets - exact) + 1e-9).astype(np.int32)
  return np.where(distance < exact, distance, np.minimum(logarithmic, num_buckets - 1))


def relative_bias(bias_rn: jax.Array, distance_bts: jax.Array, *, bidirectional: bool,
                  max_distance: int) -> jax.Array:
  """Bias on attention scores, `[b, n, t, s]` float32.

  Args:
    bias_rn: one number for each bucket and head.
    distance_bts: slot's position less query's position. Causal: what lies ahead counts as 0.
    bidirectional: half of the buckets are for slots ahead of the query.
    max_distance: beyond which all share a bucket.
  """
  num_buckets = bias_rn.shape[0]
  if bidirectional:
    num_buckets //= 2
    ahead_bts = jnp.where(distance_bts > 0, num_buckets, 0)
    distance_bts = jnp.abs(distance_bts)
  else:
    ahead_bts, distance_bts = 0, jnp.maximum(-distance_bts, 0)
  table = jnp.asarray(buckets_by_distance(num_buckets, max_distance), jnp.int32)
  bucket_bts = ahead_bts + table[jnp.minimum(distance_bts, max_distance)]
  return jnp.moveaxis(bias_rn.astype(jnp.float32)[bucket_bts], -1, 1)


class Attention(nnx.Module):
  """Attention without scaling or biases; keys and values are given, or made by `read`."""

  def __init__(self, config: Any, *, rngs: nnx.Rngs):
    d, n, h = config.width, config.num_heads, config.head_dim
    self.query_nhd = layers.normal(rngs.params(), (n, h, d), d * h)
    self.key_khd = layers.normal(rngs.params(), (n, h, d), d)
    self.value_khd = layers.normal(rngs.params(), (n, h, d), d)
    self.output_dnh = layers.normal(rngs.params(), (d, n, h), n * h)

  def read(self, x_bsd):
    """Keys and values of what is attended to, `[b, s, k, h]` each."""
    return (layers.linear(x_bsd, self.key_khd[...]), layers.linear(x_bsd, self.value_khd[...]))

  def __call__(self, x_btd, keys_bksh, values_bksh, mask_bts, bias_bnts=None):
    dtype = x_btd.dtype
    query = layers.linear(x_btd, self.query_nhd[...])
    out = layers.attend(query, keys_bksh.astype(dtype), values_bksh.astype(dtype), mask_bts,
                        scale=1.0, bias_bnts=bias_bnts)
    return layers.linear(out, self.output_dnh[...], num_inputs=2)


def heads_first(pair):
  """Fresh keys and values `[b, s, k, h]` in the layout of a cache, `[b, k, s, h]`."""
  return tuple(jnp.swapaxes(x, 1, 2) for x in pair)


def norm(config: Any) -> layers.Norm:
  return layers.Norm(config.width, kind='rms', eps=config.norm_eps)


class EncoderBlock(nnx.Module):
  """Self-attention over the prompt, then the MLP."""

  def __init__(self, config: Any, *, rngs: nnx.Rngs):
    self.config = config
    self.attention_norm, self.mlp_norm = norm(config), norm(config)
    self.attention = Attention(config, rngs=rngs)
    self.mlp = decoder_layers.MLP(config, rngs=rngs)

  def __call__(self, x_bsd, mask_bts, bias_bnts, dropout_key):
    keys = split_key(dropout_key, 2)
    normed = self.attention_norm(x_bsd)
    out = self.attention(normed, *heads_first(self.attention.read(normed)), mask_bts, bias_bnts)
    x_bsd = x_bsd + layers.dropout(out, self.config.dropout, keys[0])
    out = self.mlp(self.mlp_norm(x_bsd))
    return x_bsd + layers.dropout(out, self.config.dropout, keys[1])


class DecoderBlock(nnx.Module):
  """Causal self-attention, attention to the encoded prompt, then the MLP."""

  def __init__(self, config: Any, *, rngs: nnx.Rngs):
    self.config = config
    self.attention_norm, self.cross_norm, self.mlp_norm = (norm(config) for _ in range(3))
    self.attention = Attention(config, rngs=rngs)
    self.cross = Attention(config, rngs=rngs)
    self.mlp = decoder_layers.MLP(config, rngs=rngs)

  def __call__(self, x_btd, mask_bts, bias_bnts, prompt, prompt_mask_bts, buffers=None,
               offset_b=None, dropout_key=None):
    """`prompt`: this layer's cross keys and values; `buffers`: its cache arrays, or None."""
    keys = split_key(dropout_key, 3)
    normed = self.attention_norm(x_btd)
    fresh = self.attention.read(normed)
    if buffers is None:
      seen = heads_first(fresh)
    else:
      seen = buffers = tuple(cache_lib.write_rows(buffer, new, offset_b)
                             for buffer, new in zip(buffers, fresh))
    out = self.attention(normed, *seen, mask_bts, bias_bnts)
    x_btd = x_btd + layers.dropout(out, self.config.dropout, keys[0])
    out = self.cross(self.cross_norm(x_btd), *prompt, prompt_mask_bts)
    x_btd = x_btd + layers.dropout(out, self.config.dropout, keys[1])
    out = self.mlp(self.mlp_norm(x_btd))
    return x_btd + layers.dropout(out, self.config.dropout, keys[2]), buffers


def split_key(key: jax.Array | None, num: int):
  """`num` keys of one, or as many None: no dropout."""
  return (None,) * num if key is None else jax.random.split(key, num)
