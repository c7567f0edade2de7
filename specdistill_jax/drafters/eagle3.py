"""EAGLE-3 (arXiv 2503.01840): fused features of three layers, trained as it is used.

It has no feature loss: its output need not be a feature of the target, so the target's part can
be anything, here three layers' inputs in one linear map; and what it reads of itself must be
trained directly, by unrolling a few drafted steps (`unroll`, "training-time test"). It has a
norm and a head of its own, over the tokens that occur most often (`draft_vocabulary`).
Everything as in the authors' code, SafeAILab/EAGLE.
"""

from collections.abc import Iterable
import dataclasses
import functools
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from specdistill_jax import row_sharding
from specdistill_jax import sharding
from specdistill_jax import structs
from specdistill_jax.drafters import feature_config
from specdistill_jax.models import cache as cache_lib
from specdistill_jax.models import decoder_layers
from specdistill_jax.models import layers

NUM_CAPTURED = 3


def captured_layers(num_layers: int) -> tuple[int, ...]:
  """Layers of the target whose inputs are fused: 2, L // 2, L - 3, as released.

  In targets of less than six layers, where these are out of order, 1, L // 2 and L - 1.
  """
  low, high = (2, num_layers - 3) if num_layers >= 6 else (1, num_layers - 1)
  return min(low, num_layers - 1), num_layers // 2, high


@dataclasses.dataclass(frozen=True)
class Eagle3Config(feature_config.FeatureConfig):
  """EAGLE-3.

  Attributes:
    draft_vocab_size: tokens that its head can draft; at most vocab_size.
    draft_vocabulary: which ones, see `vocabulary_bits`; empty: the first.
    captured_layers: of the target, low, middle and high; by default `captured_layers` of it.
    unrolled_steps: of training (the released code has 7, the paper 5).
    step_decay: weight of an unrolled step, over that of the step before.
  """
  family: ClassVar[str] = 'eagle3'
  draft_vocab_size: int = 32_000
  draft_vocabulary: str = ''
  captured_layers: tuple[int, ...] = ()
  unrolled_steps: int = 7
  step_decay: float = 0.8

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, 'captured_layers', tuple(self.captured_layers))
    if len(self.captured_layers) != NUM_CAPTURED:
      raise ValueError(f'eagle3: captured_layers are {self.captured_layers}; there must be '
                       f'{NUM_CAPTURED}')
    if not 1 <= self.draft_vocab_size <= self.vocab_size:
      raise ValueError(f'eagle3: draft_vocab_size is {self.draft_vocab_size}; it must be at least '
                       f"1 and at most the target's {self.vocab_size} tokens")
    if self.unrolled_steps < 1:
      raise ValueError(f'eagle3: unrolled_steps is {self.unrolled_steps}; it must be at least 1')
    ids = self.draft_ids()
    if len(ids) != self.draft_vocab_size or ids[-1] >= self.vocab_size:
      raise ValueError(f'eagle3: draft_vocabulary has {len(ids)} tokens up to {ids[-1]}; there '
                       f'must be {self.draft_vocab_size}, below {self.vocab_size}')

  @classmethod
  def defaults_for(cls, target: Any) -> dict[str, Any]:
    """Fields of its own that depend on the target."""
    return dict(captured_layers=captured_layers(target.num_layers),
                draft_vocab_size=min(cls.draft_vocab_size, target.vocab_size))

  def draft_ids(self) -> np.ndarray:
    """The target's id of each token of the draft's vocabulary, int32, ascending."""
    if not self.draft_vocabulary:
      return np.arange(self.draft_vocab_size, dtype=np.int32)
    return vocabulary_ids(self.draft_vocabulary)


def vocabulary_bits(ids: Iterable[int], vocab_size: int) -> str:
  """A set of token ids as hexadecimal digits, a bit a token: short, hashable, and JSON."""
  bits = np.zeros(vocab_size, np.uint8)
  bits[np.asarray(list(ids), np.int64)] = 1
  return np.packbits(bits).tobytes().hex()


@functools.lru_cache(maxsize=8)
def vocabulary_ids(bits: str) -> np.ndarray:
  """The inverse: ids, int32, ascending."""
  return np.flatnonzero(np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))
                        ).astype(np.int32)


def most_frequent(counts: np.ndarray, size: int) -> np.ndarray:
  """The ids of the `size` largest counts, ascending; of equal counts the lower ids."""
  return np.sort(np.argsort(-np.asarray(counts), kind='stable')[:size]).astype(np.int32)


class Eagle3(nnx.Module):
  """The network; an instance is a pytree of its own parameters alone, its head included."""

  def __init__(self, config: Eagle3Config, *, rngs: nnx.Rngs):
    d, layer = config.width, config.layer()
    self.config = config
    self.fusion_dw = feature_config.linear_init(rngs, d, NUM_CAPTURED * d)
    self.embedding_norm = feature_config.norm(config)
    self.carried_norm = feature_config.norm(config)
    self.attention = decoder_layers.Attention(layer, rngs=rngs, input_width=2 * d,
                                              init=layers.uniform)
    self.mlp_norm = feature_config.norm(config)
    self.mlp = decoder_layers.MLP(layer, rngs=rngs, init=layers.uniform)
    self.final_norm = feature_config.norm(config)
    self.head_vd = feature_config.linear_init(rngs, config.draft_vocab_size, d)

  @property
  def captured(self) -> tuple[int, ...]:
    return self.config.captured_layers

  @property
  def positions(self) -> int:
    """Unrolled in training."""
    return self.config.unrolled_steps

  def inputs(self, features: dict[str, jax.Array]) -> jax.Array:
    """What is carried beside a token at a verified position: three layers' inputs, fused."""
    return layers.linear(features['captured_btw'].astype(self.config.dtype),
                         self.fusion_dw[...])

  def __call__(self, embedded_btd, carried_btd, positions_bt, mask_bts, cache=None):
    """As `fspad.Eagle`: what the head reads, what the next step carries, and the cache."""
    held = None if cache is None else (cache.keys_bksh[0], cache.values_bksh[0])
    out_btd, held = self.attention(
        self._joined(embedded_btd, carried_btd), positions_bt, mask_bts, held,
        None if cache is None else cache.length_b, self.config.frequencies())
    if cache is not None:
      cache = cache.replace(keys_bksh=(held[0],), values_bksh=(held[1],),
                            length_b=cache.length_b + positions_bt.shape[1])
    return *self._finished(carried_btd, out_btd), cache

  def _joined(self, embedded_btd, carried_btd):
    """What attention reads: `[b, t, 2d]`."""
    embedded_btd = self.embedding_norm(embedded_btd.astype(carried_btd.dtype))
    return jnp.concatenate([embedded_btd, self.carried_norm(carried_btd)], axis=-1)

  def _finished(self, carried_btd, attended_btd):
    """What the head reads, and what the next step carries."""
    x_btd = carried_btd + attended_btd
    x_btd = x_btd + self.mlp(self.mlp_norm(x_btd))
    return self.final_norm(x_btd), x_btd

  def head(self, read_btd, target=None) -> jax.Array:
    """Logits over its own vocabulary, float32; the target's head isn't needed."""
    del target
    logits = layers.linear(row_sharding.for_head(read_btd), self.head_vd[...],
                           result_dtype=jnp.float32)
    return sharding.constrain(logits, 'btv')

  def logits(self, read_btd, target=None) -> jax.Array:
    """Logits over the target's vocabulary; a token outside of its own has -inf."""
    logits = self.head(read_btd, target)
    everywhere = jnp.full((*logits.shape[:-1], self.config.vocab_size), -jnp.inf, logits.dtype)
    return everywhere.at[..., self.config.draft_ids()].set(
        logits, indices_are_sorted=True, unique_indices=True)

  def restrict(self, logits_btv) -> jax.Array:
    """The target's logits over its own vocabulary."""
    return jnp.take(logits_btv, self.config.draft_ids(), axis=-1)

  @property
  def loss_settings(self) -> dict[str, Any]:
    """For `losses.features.feature_loss`: cross-entropy alone, over all positions."""
    return dict(regression=0.0, classification=1.0, decay=self.config.step_decay,
                over_all_positions=True)

  def unroll(self, teacher, batch: structs.Batch, key=None) -> tuple[structs.DraftStep, ...]:
    """Drafting as it will be: step k starts at every position from what step k - 1 put out.

    Tokens are the true ones. Everything stays at position t, while tokens, teacher and mask
    move left a place a step. Gradients flow through all steps; there is no noise.
    """
    del key
    output = teacher.capturing(self.captured).causal(batch.tokens_bt)
    features = jax.lax.stop_gradient(output.features)
    positions_bt, mask_bts = feature_config.causal(batch.tokens_bt)
    mask_bt = feature_config.pair_mask(batch)
    carried_btd, keys, values, steps = self.inputs(features), (), (), []
    step = self._unrolled_step
    if self.config.remat != 'none':
      step = jax.checkpoint(step)
    for k in range(self.config.unrolled_steps):
      tokens_bt = feature_config.shift_left(batch.tokens_bt, k + 1)
      embedded_btd = jax.lax.stop_gradient(teacher.embed(tokens_bt, positions_bt + k + 1))
      read_btd, carried_btd, keys, values = step(
          embedded_btd, carried_btd, positions_bt + k, mask_bts, keys, values)
      steps.append(structs.DraftStep(
          read_btd=read_btd, predicted_btd=carried_btd,
          taught_btd=feature_config.shift_left(features['final_btd'], k + 1),
          mask_bt=feature_config.shift_left(mask_bt, k)))
    return tuple(steps)

  def _unrolled_step(self, embedded_btd, carried_btd, positions_bt, mask_bts, keys, values):
    """A step, with the keys and values `[b, t, k, h]` of the steps before it and its own."""
    query, key, value = self.attention.heads(
        self._joined(embedded_btd, carried_btd), positions_bt, self.config.frequencies())
    keys, values = (*keys, key), (*values, value)
    out = attend_unrolled(query, keys, values, mask_bts, scale=self.attention.scale)
    return *self._finished(carried_btd, self.attention.combine(out)), keys, values

  def init_cache(self, batch: int, num_slots: int) -> cache_lib.KVCache:
    c = self.config
    return cache_lib.init_cache(1, batch, num_slots, c.num_kv_heads, c.head_dim,
                                jnp.dtype(c.dtype))


def attend_unrolled(query_btnh, keys, values, mask_bts, *, scale: float) -> jax.Array:
  """Attention of an unrolled step: the first step's keys, and one of each later step.

  A query at t sees the first step's keys where `mask_bts` says so, as in drafting that began
  there, and of each later step the one key at its own place t. One softmax over all of them.

  Args:
    query_btnh: of the newest step.
    keys: of every step, `[b, t, k, h]` each; the newest step's are its own. Likewise `values`.
  """
  b, t, n, h = query_btnh.shape
  k = keys[0].shape[2]
  grouped = query_btnh.reshape(b, t, k, n // k, h)
  first = jnp.einsum('btkgh,bskh->btkgs', grouped, keys[0], preferred_element_type=jnp.float32)
  first = jnp.where(mask_bts[:, :, None, None], first * scale, layers.MASKED)
  later = [scale * jnp.einsum('btkgh,btkh->btkg', grouped, key,
                              preferred_element_type=jnp.float32)[..., None] for key in keys[1:]]
  weights = jax.nn.softmax(jnp.concatenate([first, *later], axis=-1), axis=-1)
  weights = weights.astype(query_btnh.dtype)
  s = keys[0].shape[1]
  out = jnp.einsum('btkgs,bskh->btkgh', weights[..., :s], values[0])
  for index, value in enumerate(values[1:]):
    out = out + weights[..., s + index, None] * value[:, :, :, None]
  return out.reshape(b, t, n, h)


def init(config: Eagle3Config, key: jax.Array) -> Eagle3:
  """A freshly initialised draft; trace it under `sharding.sharded_init` to lay it out."""
  generator = jax.random.key(jax.random.bits(key, dtype=jnp.uint32), impl='rbg')
  return Eagle3(config, rngs=nnx.Rngs(params=generator))
