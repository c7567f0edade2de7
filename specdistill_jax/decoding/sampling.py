"""Warping of logits (temperature, top-k, top-p) and per-row categorical draws.

Target and drafter go through the same `warp`, so acceptance compares the two laws that are
really sampled from ("standardised sampling", Leviathan et al. 2023, arXiv 2211.17192).
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a next-token law is made of logits. Hashable: a static argument of jitted loops.

  Attributes:
    temperature: 0 is greedy (one-hot at the lowest-numbered argmax).
    top_k: keep the k most probable tokens, ties at the k-th place included; None keeps all.
    top_p: keep the smallest set of most probable tokens whose mass reaches top_p (after
      top-k), ties included; None keeps all.
  """
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not 0.0 <= self.temperature < float('inf'):
      raise ValueError(f'temperature is {self.temperature}; it must be 0 (greedy) or positive')
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f'top_k is {self.top_k}; it must be at least 1, or None to keep all')
    if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
      raise ValueError(f'top_p is {self.top_p}; it must lie in (0, 1], or be None to keep all')

  @property
  def is_greedy(self) -> bool:
    return self.temperature == 0.0


def one_hot_log_probs(token: jax.Array, num_tokens: int) -> jax.Array:
  """log of the point mass at `token`: `[...] -> [..., v]`, 0 there and -inf elsewhere."""
  return jnp.where(jnp.arange(num_tokens) == token[..., None], 0.0, -jnp.inf)


def greatest_threshold(values: jax.Array, weights: jax.Array | float,
                       enough: jax.Array | float) -> jax.Array:
  """The greatest value that, with all values above it, weighs `enough`: `[..., v] -> [...]`.

  The least value where even all of them don't. Found by bisection over the 32 bits of a
  float32, whose order is that of integers: 32 sums over `v`, where sorting takes fifty
  times as long on a CPU, and exact, ties included.
  """
  bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32) + 0.0, jnp.int32)  # no -0
  # Negative floats are ordered backwards; an offset makes all of them unsigned.
  ordered = (bits ^ ((bits >> 31) & 0x7fffffff)).astype(jnp.uint32) ^ jnp.uint32(1 << 31)

  def settle(index, found):
    raised = found | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
    weight = jnp.sum(jnp.where(ordered >= raised[..., None], weights, 0.0), axis=-1)
    return jnp.where(weight >= enough, raised, found)

  found = jax.lax.fori_loop(0, 32, settle, jnp.zeros(values.shape[:-1], jnp.uint32))
  found = jnp.maximum(found, jnp.min(ordered, axis=-1))
  bits = (found ^ jnp.uint32(1 << 31)).astype(jnp.int32)
  return jax.lax.bitcast_convert_type(bits ^ ((bits >> 31) & 0x7fffffff), jnp.float32)


def _keep_top_k(logits: jax.Array, k: int) -> jax.Array:
  threshold = greatest_threshold(logits, 1.0, k)
  return jnp.where(logits >= threshold[..., None], logits, -jnp.inf)


def _keep_top_p(logits: jax.Array, mass: float) -> jax.Array:
  threshold = greatest_threshold(logits, jax.nn.softmax(logits, axis=-1), mass)
  return jnp.where(logits >= threshold[..., None], logits, -jnp.inf)


def warp(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """`[..., v]` logits to the log-probabilities that are sampled from, float32.

  Order as in Hugging Face and vLLM: temperature, top-k, top-p, renormalise.
  """
  logits = logits.astype(jnp.float32)
  if sampling.is_greedy:
    return one_hot_log_probs(jnp.argmax(logits, axis=-1), logits.shape[-1])
  logits = logits / sampling.temperature
  if sampling.top_k is not None:
    logits = _keep_top_k(logits, sampling.top_k)
  if sampling.top_p is not None and sampling.top_p < 1.0:
    logits = _keep_top_p(logits, sampling.top_p)
  return jax.nn.log_softmax(logits, axis=-1)


def row_keys(key: jax.Array, num_rows: int) -> jax.Array:
  """One key a row: `key` folded with the row's index, or `key` itself if it has a row axis.

  A row's draws so depend on its index alone, not on its neighbours or their number.
  """
  if key.ndim == 0:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_rows))
  if key.shape != (num_rows,):
    raise ValueError(f'key has shape {key.shape}; it must be one key, or one for each of the '
                     f'{num_rows} rows')
  return key


def split_rows(key_b: jax.Array, num: int) -> jax.Array:
  """`[b]` keys to `[num, b]` keys."""
  return jnp.swapaxes(jax.vmap(lambda key: jax.random.split(key, num))(key_b), 0, 1)


def categorical(key_b: jax.Array, log_probs_bv: jax.Array) -> jax.Array:
  """One draw a row from normalised or unnormalised log-probabilities: int32 `[b]`.

  Inverse-transform sampling in two levels, a block of tokens and then a token within it, each
  with a uniform draw of its own: two random numbers a row where the Gumbel trick takes `v`,
  and a finer resolution than a single 23-bit uniform has. A token of probability zero is
  never drawn: a draw lies strictly below the total, and only a positive weight steps past it.
  """
  b, num_tokens = log_probs_bv.shape
  width = 1 << ((num_tokens - 1).bit_length() + 1) // 2  # blocks about as many as their tokens
  num_blocks = -(-num_tokens // width)
  weights_bv = jnp.exp(log_probs_bv - jnp.max(log_probs_bv, axis=-1, keepdims=True))
  padded_bv = jnp.pad(weights_bv, ((0, 0), (0, num_blocks * width - num_tokens)))
  weights = padded_bv.reshape(b, num_blocks, width)
  uniform_b2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(key_b)
  block_b = _invert(jnp.sum(weights, axis=-1), uniform_b2[:, 0])
  within = jnp.take_along_axis(weights, block_b[:, None, None], axis=1)[:, 0]
  return (block_b * width + _invert(within, uniform_b2[:, 1])).astype(jnp.int32)


def draw(key_b: jax.Array, log_probs_bv: jax.Array, greedy: bool) -> jax.Array:
  """A token a row, int32 `[b]`: the best where `greedy`, else one drawn by `categorical`."""
  if greedy:
    return jnp.argmax(log_probs_bv, axis=-1).astype(jnp.int32)
  return categorical(key_b, log_probs_bv)


def without_replacement(key_b: jax.Array, log_probs_bv: jax.Array, num: int) -> jax.Array:
  """`num` draws a row, each without the tokens of the earlier ones: int32 `[b, num]`.

  Where a law has fewer tokens than that, what follows its last one is filler.
  """
  tokens = []
  for key_b in split_rows(key_b, num):
    tokens.append(categorical(key_b, log_probs_bv))
    rest_bv = jnp.where(jnp.arange(log_probs_bv.shape[1]) == tokens[-1][:, None], -jnp.inf,
                        log_probs_bv)
    is_last_b1 = jnp.max(rest_bv, axis=-1, keepdims=True) == -jnp.inf
    log_probs_bv = jnp.where(is_last_b1, log_probs_bv, rest_bv)
  return jnp.stack(tokens, axis=1)


def _invert(weights: jax.Array, uniform_b: jax.Array) -> jax.Array:
  """The first index whose cumulative weight exceeds `uniform` of the total: `[b, w] -> [b]`."""
  width = weights.shape[-1]
  # A masked sum: log-depth scans are many small steps, and the widths here are small.
  through = jnp.tril(jnp.ones((width, width), weights.dtype))
  cumulative = jnp.sum(weights[:, None, :] * through, axis=-1)
  return jnp.sum(cumulative <= uniform_b[:, None] * cumulative[:, -1:], axis=-1)
