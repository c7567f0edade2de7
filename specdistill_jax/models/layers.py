"""Layers shared by the model families. Names end in their axes; see structs.py for the legend.

Matrix products run in the config's dtype; norms, rotations, softmax and logits in float32.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30  # finite: a query that sees nothing yields a mean, not NaN


def normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
  """Truncated normal with variance 1/fan_in."""
  init = jax.nn.initializers.truncated_normal(fan_in ** -0.5)
  return nnx.Param(init(key, shape, jnp.float32))


class Norm(nnx.Module):
  """RMSNorm (Zhang & Sennrich 2019) or LayerNorm, in float32.

  `offset` is added to the scale, as Gemma stores scale - 1.
  """

  def __init__(self, width: int, *, kind: str, eps: float, offset: float = 0.0):
    self.kind, self.eps, self.offset = kind, eps, offset
    self.scale_d = nnx.Param(jnp.full((width,), 1.0 - offset, jnp.float32))
    self.bias_d = nnx.Param(jnp.zeros((width,), jnp.float32)) if kind == 'layer' else None

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    if self.kind == 'layer':
      y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    y = y * (self.scale_d[...].astype(jnp.float32) + self.offset)
    if self.bias_d is not None:
      y = y + self.bias_d[...]
    return y.astype(x.dtype)


ROPE_SCALINGS = ('none', 'linear', 'llama3')


def rope_frequencies(theta: float, head_dim: int, *, scaling: str = 'none', factor: float = 1.0,
                     low: float = 1.0, high: float = 4.0,
                     original_positions: int = 8192) -> np.ndarray:
  """Angles a position, in radians, float32 `[h / 2]`: theta^(-2i/h), stretched for long texts.

  'linear' divides all of them by `factor` (Chen et al. 2023, arXiv 2306.15595). 'llama3' divides
  those that turn less than `low` times over the original positions, leaves those that turn
  more than `high` times, and goes over smoothly in between (Llama 3.1's own code).
  """
  half = head_dim // 2
  frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
  if scaling == 'linear':
    frequency = frequency / factor
  elif scaling == 'llama3':
    turns = original_positions * frequency / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    frequency = frequency * (kept + (1.0 - kept) / factor)
  return frequency.astype(np.float32)


def rope(x_btnh: jax.Array, positions_bt: jax.Array, frequencies: jax.Array) -> jax.Array:
  """Rotary position embedding (Su et al. 2021), halves rotated, angles in float32.

  bfloat16 angles would not tell position 256 from 257.
  """
  angle = positions_bt[..., None, None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_btnh.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """cap * tanh(x / cap), Gemma 2's bound on logits; the identity when cap is None."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def attend(query_btnh: jax.Array, keys_bksh: jax.Array, values_bksh: jax.Array,
           mask_bts: jax.Array, *, scale: float, cap: float | None = None,
           bias_bnts: jax.Array | None = None) -> jax.Array:
  """Grouped-query attention: n query heads share k key/value heads. Returns `[b, t, n, h]`.

  `bias_bnts` is added to the scores; its rows, and those of the mask, may be one for all.
  """
  b, t, n, h = query_btnh.shape
  k = keys_bksh.shape[1]
  # The queries of one key head lie side by side, so that a group is one matrix product.
  query = query_btnh.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)
  query = query.reshape(b, k, (n // k) * t, h)
  scores = jnp.einsum('bkqh,bksh->bkqs', query, keys_bksh,
                      preferred_element_type=jnp.float32) * scale
  scores = soft_cap(scores, cap).reshape(b, k, n // k, t, -1)
  if bias_bnts is not None:
    scores = scores + bias_bnts.reshape(-1, k, n // k, *bias_bnts.shape[2:])
  scores = jnp.where(mask_bts[:, None, None], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(values_bksh.dtype)
  out = jnp.einsum('bkqs,bksh->bkqh', weights.reshape(b, k, (n // k) * t, -1), values_bksh)
  return out.reshape(b, k, n // k, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


ACTIVATIONS = {
    'silu': jax.nn.silu,
    'relu': jax.nn.relu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
}


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Inverted dropout; the identity without a key or at rate 0."""
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
  return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)
