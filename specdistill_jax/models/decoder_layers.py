"""Attention and MLP of the decoders, and of the drafts that are made of the same layers.

`config` is a `decoder.DecoderConfig`.
"""

from typing import Any

from flax import nnx
import jax.numpy as jnp

from specdistill_jax.models import cache as cache_lib
from specdistill_jax.models import layers


class Attention(nnx.Module):
  """Self-attention with rotary positions and an optional norm on queries and keys (Qwen3).

  It may read vectors of another width, `input_width`, than it writes.
  """

  def __init__(self, config: Any, *, rngs: nnx.Rngs, input_width: int | None = None,
               init: layers.Init = layers.normal):
    c = config
    d, n, k, h = input_width or c.width, c.num_heads, c.num_kv_heads, c.head_dim
    self.config = c
    self.query_nhd = init(rngs.params(), (n, h, d), d)
    self.key_khd = init(rngs.params(), (k, h, d), d)
    self.value_khd = init(rngs.params(), (k, h, d), d)
    self.output_dnh = init(rngs.params(), (c.width, n, h), n * h)
    zeros = lambda shape, used: nnx.Param(jnp.zeros(shape, jnp.float32)) if used else None
    self.query_bias_nh = zeros((n, h), c.attention_bias)
    self.key_bias_kh = zeros((k, h), c.attention_bias)
    self.value_bias_kh = zeros((k, h), c.attention_bias)
    self.output_bias_d = zeros((c.width,), c.output_bias)
    norm = lambda: layers.Norm(h, kind='rms', eps=c.norm_eps, offset=c.norm_offset)
    self.query_norm = norm() if c.qk_norm else None
    self.key_norm = norm() if c.qk_norm else None

  def _project(self, x_btd, weight, bias, norm):
    y = layers.linear(x_btd, weight[...])
    if bias is not None:
      y = y + bias[...].astype(y.dtype)
    return y if norm is None else norm(y)

  def __call__(self, x_btd, positions_bt, mask_bts, buffers, offset_b, frequencies):
    """`buffers` are this layer's cache arrays, or None; returns the output and new buffers.

    `frequencies` are the layer's rotary ones, float32 `[h / 2]`; unused with learnt positions.
    """
    query, key, value = self.heads(x_btd, positions_bt, frequencies)
    if buffers is None:
      keys, values = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    else:
      keys = cache_lib.write_rows(buffers[0], key, offset_b)
      values = cache_lib.write_rows(buffers[1], value, offset_b)
      buffers = (keys, values)
    out = layers.attend(query, keys.astype(query.dtype), values.astype(query.dtype), mask_bts,
                        scale=self.scale, cap=self.config.attention_softcap)
    return self.combine(out), buffers

  @property
  def scale(self) -> float:
    c = self.config
    return c.head_dim ** -0.5 if c.query_scale is None else c.query_scale

  def heads(self, x_btd, positions_bt, frequencies):
    """Queries `[b, t, n, h]`, keys and values `[b, t, k, h]`, at their positions."""
    query = self._project(x_btd, self.query_nhd, self.query_bias_nh, self.query_norm)
    key = self._project(x_btd, self.key_khd, self.key_bias_kh, self.key_norm)
    value = self._project(x_btd, self.value_khd, self.value_bias_kh, None)
    if self.config.position == 'rope':
      query = layers.rope(query, positions_bt, frequencies)
      key = layers.rope(key, positions_bt, frequencies)
    return query, key, value

  def combine(self, out_btnh):
    """What all heads have found, as one vector."""
    out_btd = layers.linear(out_btnh, self.output_dnh[...], num_inputs=2)
    if self.output_bias_d is not None:
      out_btd = out_btd + self.output_bias_d[...].astype(out_btd.dtype)
    return out_btd


class MLP(nnx.Module):
  """Two- or three-matrix MLP; gated (Shazeer 2020) when the config says so.

  It may write vectors of another width, `output_width`, than it reads.
  """

  def __init__(self, config: Any, *, rngs: nnx.Rngs, output_width: int | None = None,
               init: layers.Init = layers.normal):
    d, f = config.width, config.mlp_width
    self.config = config
    self.up_fd = init(rngs.params(), (f, d), d)
    self.gate_fd = init(rngs.params(), (f, d), d) if config.gated_mlp else None
    self.down_df = init(rngs.params(), (output_width or d, f), f)
    self.up_bias_f = nnx.Param(jnp.zeros((f,), jnp.float32)) if config.mlp_bias else None
    self.down_bias_d = nnx.Param(jnp.zeros((d,), jnp.float32)) if config.mlp_bias else None

  def __call__(self, x_btd):
    dtype = x_btd.dtype
    act = layers.ACTIVATIONS[self.config.activation]
    up = layers.linear(x_btd, self.up_fd[...])
    if self.up_bias_f is not None:
      up = up + self.up_bias_f[...].astype(dtype)
    if self.gate_fd is None:
      hidden = act(up)
    else:
      hidden = act(layers.linear(x_btd, self.gate_fd[...])) * up
    out = layers.linear(hidden, self.down_df[...])
    return out if self.down_bias_d is None else out + self.down_bias_d[...].astype(dtype)
