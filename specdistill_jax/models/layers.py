"""Layers shared by the model families. Names end in their axes; see structs.py for the legend.

Matrix products run in the config's dtype; norms, rotations, softmax and logits in float32.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

# A key, a shape, and how many inputs each output sums over.
Init = Callable[[jax.Array, tuple[int, ...], int], nnx.Param]
MASKED = -1e30  # finite: a query that sees nothing yields a mean, not NaN


def normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
  """Truncated normal with variance 1/fan_in."""
  init = jax.nn.initializers.truncated_normal(fan_in ** -0.5)
  return nnx.Param(init(key, shape, jnp.float32))


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
  """Uniform within 1/sqrt(fan_in), as PyTorch initialises linear layers."""
  bound = fan_in ** -0.5
  return nnx.Param(jax.random.uniform(key, shape, jnp.float32, -bound, bound))


# Up to this many rows a CPU is bound by reading the weights, as in decoding.
FEW_ROWS = 64
SINGLE_ROW_PARTS = 4


def linear(x: jax.Array, weight: jax.Array, *, num_inputs: int = 1,
           result_dtype: jnp.dtype | None = None) -> jax.Array:
  """`x [..., *inputs]` times `weight [*outputs, *inputs]` gives `[..., *outputs]`.

  Weights are stored outputs first, as PyTorch and Hugging Face store them: a row of the weight
  is then read in one go. The product runs in the dtype of `x`.

  Args:
    num_inputs: trailing axes that are summed over.
    result_dtype: of the result; None means that of `x`.
  """
  return _linear(x, weight.astype(x.dtype), num_inputs=num_inputs,
                 result_dtype=x.dtype if result_dtype is None else result_dtype)


@functools.partial(jax.jit, static_argnames=('num_inputs', 'result_dtype'), inline=True)
def _linear(x, weight, *, num_inputs, result_dtype):
  """`linear`, compiled once a shape where a module is called outside of any jit."""
  settings = dict(num_inputs=num_inputs, result_dtype=result_dtype)
  product = functools.partial(_product, **settings)
  if math.prod(x.shape[:x.ndim - num_inputs]) > FEW_ROWS:
    return product(x, weight)
  return jax.lax.platform_dependent(
      x, weight, cpu=functools.partial(_few_rows, **settings), default=product)


def _product(x, weight, *, num_inputs, result_dtype):
  inputs = lambda array: tuple(range(array.ndim - num_inputs, array.ndim))
  return jax.lax.dot_general(x, weight, ((inputs(x), inputs(weight)), ((), ())),
                             preferred_element_type=result_dtype)


def _few_rows(x, weight, *, num_inputs, result_dtype):
  """The same, as weight times x, which XLA's CPU backend runs without repacking the weight.

  The barriers keep the compiler from turning the product around again. Measured on two cores
  with 150 MB of weights: a row takes 4.8 ms (5.3 ms as `_product`), six take 7.6 ms (12.5 ms).
  """
  lead, outputs = x.shape[:x.ndim - num_inputs], weight.shape[:weight.ndim - num_inputs]
  width, rows = math.prod(weight.shape[weight.ndim - num_inputs:]), math.prod(lead)
  weight, x = weight.reshape(-1, width), x.reshape(rows, width)
  # A single row: independent parts of the weight run on several cores; a whole one does not.
  # More: padded to the number that the kernel takes at once.
  parts = math.gcd(SINGLE_ROW_PARTS, weight.shape[0]) if rows == 1 else 1
  padding = 0 if rows == 1 else -rows % (4 if rows <= 4 else 8 if rows <= 8 else 16)
  columns = jax.lax.optimization_barrier(
      jnp.broadcast_to(jnp.pad(x, ((0, padding), (0, 0))).T, (parts, width, rows + padding)))
  out = jax.lax.optimization_barrier(
      jnp.einsum('pij,pjr->pir', weight.reshape(parts, -1, width), columns,
                 preferred_element_type=result_dtype))
  return out.reshape(-1, rows + padding)[:, :rows].T.reshape(*lead, *outputs)


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


MANY_QUERIES, QUERIES_AT_ONCE = 512, 256


def attend(query_btnh: jax.Array, keys_bksh: jax.Array, values_bksh: jax.Array,
           mask_bts: jax.Array, *, scale: float, cap: float | None = None,
           bias_bnts: jax.Array | None = None) -> jax.Array:
  """Grouped-query attention: n query heads share k key/value heads. Returns `[b, t, n, h]`.

  `bias_bnts` is added to the scores; its rows, and those of the mask, may be one for all. Of long
  rows some queries have their scores at a time, in the backward pass too.
  """
  t = query_btnh.shape[1]
  if t <= MANY_QUERIES:
    return _attend(query_btnh, keys_bksh, values_bksh, mask_bts, bias_bnts, scale, cap)
  parts = -(-t // QUERIES_AT_ONCE)
  def split(x, axis):
    if x is None or x.shape[axis] == 1:
      return None
    padded = jnp.pad(x, [(0, -t % parts * (axis == i)) for i in range(x.ndim)])
    return jnp.moveaxis(
        padded.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1:]), axis, 0)
  @jax.checkpoint
  def some(part):
    query, mask, bias = part
    return _attend(query, keys_bksh, values_bksh, mask_bts if mask is None else mask,
                   bias_bnts if bias is None else bias, scale, cap)
  out = jax.lax.map(some, (split(query_btnh, 1), split(mask_bts, 1), split(bias_bnts, 2)))
  return jnp.moveaxis(out, 0, 1).reshape(query_btnh.shape[0], -1, *query_btnh.shape[2:])[:, :t]


def _attend(query_btnh, keys_bksh, values_bksh, mask_bts, bias_bnts, scale, cap):
  b, t, n, h = query_btnh.shape
  k = keys_bksh.shape[1]
  # The queries of one key head lie side by side, so that a group is one matrix product.
  query = query_btnh.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4)
  query = query.reshape(b, k, (n // k) * t, h)
  scores = _batched('...qh,...sh->...qs', query, keys_bksh) * scale
  scores = soft_cap(scores, cap).reshape(b, k, n // k, t, -1)
  if bias_bnts is not None:
    scores = scores + bias_bnts.reshape(-1, k, n // k, *bias_bnts.shape[2:])
  scores = jnp.where(mask_bts[:, None, None], scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(values_bksh.dtype)
  out = _batched('...qs,...sh->...qh', weights.reshape(b, k, (n // k) * t, -1), values_bksh)
  out = out.astype(values_bksh.dtype)
  return out.reshape(b, k, n // k, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _batched(equation, left, right):
  """A product batched over rows and heads, in float32; a single row goes without its axis.

  XLA's CPU backend otherwise updates a cache once to carry it and once to read it here, and
  copies it for that (see `decoding.state.run`).
  """
  single = left.shape[0] == 1
  if single:
    left, right = left[0], right[0]
  out = jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
  return out[None] if single else out


REMAT = ('none', 'dots', 'full')


def unstacked(stack: Any, count: int, *, release: bool = False) -> list[Any]:
  """Modules of single layers of one whose arrays have a leading axis of `count` layers.

  Args:
    release: frees each array of `stack` once its layers are copied, so that never more than one
      of them is there twice; `stack` is of no use then.
  """
  leaves, structure = jax.tree.flatten(stack)
  parts = []
  for leaf in leaves:
    parts.append([leaf[index] for index in range(count)])
    if release:
      jax.block_until_ready(parts[-1])
      leaf.delete()
  return [jax.tree.unflatten(structure, layer) for layer in zip(*parts)]


def rematerialised(body, remat: str):
  """The body of a scan over layers, with what its backward pass keeps of each layer.

  `none`: everything; `dots`: the matrix products' results, without those of attention;
  `full`: the layer's input alone, so that the layer runs twice.
  """
  if remat == 'none':
    return body
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == 'dots' else None
  return jax.checkpoint(body, policy=policy, prevent_cse=False)


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
