"""DeepSeek-V3's multi-token prediction module (arXiv 2412.19437, 2.2) as a recurrent draft.

Two norms, one for the carried feature and one for the next token's embedding, a linear map of
both to the width of a feature, one whole decoder layer, and the target's own head behind a norm.
DeepSeek trains it for one step; used again on its own output it drafts further ones, for which
the LK paper (arXiv 2602.23881) trains it unrolled, as here.
"""

import dataclasses
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from specdistill_jax import structs
from specdistill_jax.drafters import eagle3
from specdistill_jax.drafters import feature_config
from specdistill_jax.models import cache as cache_lib
from specdistill_jax.models import decoder_layers
from specdistill_jax.models import layers


@dataclasses.dataclass(frozen=True)
class MTPConfig(feature_config.FeatureConfig):
  """Attributes:
    unrolled_steps: of training, each a draft position.
    step_decay: weight of an unrolled step, over that of the step before, in its own loss.
  """
  family: ClassVar[str] = 'mtp'
  unrolled_steps: int = 6
  step_decay: float = 0.8

  def __post_init__(self):
    super().__post_init__()
    if self.unrolled_steps < 1:
      raise ValueError(f'mtp: unrolled_steps is {self.unrolled_steps}; it must be at least 1')


class MTP(nnx.Module):
  """The network; an instance is a pytree of its own parameters alone."""
  captured = ()

  def __init__(self, config: MTPConfig, *, rngs: nnx.Rngs):
    d, layer = config.width, config.layer()
    self.config = config
    self.carried_norm = feature_config.norm(config)
    self.embedding_norm = feature_config.norm(config)
    self.fusion_dw = feature_config.linear_init(rngs, d, 2 * d)
    self.attention_norm = feature_config.norm(config)
    self.attention = decoder_layers.Attention(layer, rngs=rngs, init=layers.uniform)
    self.mlp_norm = feature_config.norm(config)
    self.mlp = decoder_layers.MLP(layer, rngs=rngs, init=layers.uniform)
    self.final_norm = feature_config.norm(config)

  @property
  def positions(self) -> int:
    """Unrolled in training."""
    return self.config.unrolled_steps

  def inputs(self, features: dict[str, jax.Array]) -> jax.Array:
    """What is carried beside a token at a verified position: the target's last feature."""
    return features['final_btd'].astype(self.config.dtype)

  def __call__(self, embedded_btd, carried_btd, positions_bt, mask_bts, cache=None):
    """As `fspad.Eagle`: what the head reads, what the next step carries, and the cache."""
    held = None if cache is None else (cache.keys_bksh[0], cache.values_bksh[0])
    x_btd = self._fused(embedded_btd, carried_btd)
    out_btd, held = self.attention(
        self.attention_norm(x_btd), positions_bt, mask_bts, held,
        None if cache is None else cache.length_b, self.config.frequencies())
    if cache is not None:
      cache = cache.replace(keys_bksh=(held[0],), values_bksh=(held[1],),
                            length_b=cache.length_b + positions_bt.shape[1])
    return *self._finished(x_btd, out_btd), cache

  def _fused(self, embedded_btd, carried_btd):
    carried_btd = carried_btd.astype(self.config.dtype)
    embedded_btd = embedded_btd.astype(carried_btd.dtype)
    return layers.linear(jnp.concatenate(
        [self.carried_norm(carried_btd), self.embedding_norm(embedded_btd)], axis=-1),
        self.fusion_dw[...])

  def _finished(self, x_btd, attended_btd):
    x_btd = x_btd + attended_btd
    x_btd = x_btd + self.mlp(self.mlp_norm(x_btd))
    return self.final_norm(x_btd), x_btd

  def head(self, read_btd, target) -> jax.Array:
    """Logits over its own vocabulary, all of the target's, by the target's own head."""
    return target.logits(read_btd)

  logits = head

  def restrict(self, logits_btv) -> jax.Array:
    """The target's logits over its own vocabulary."""
    return logits_btv

  @property
  def loss_settings(self) -> dict[str, Any]:
    """For `losses.features.feature_loss`: cross-entropy alone."""
    return dict(regression=0.0, classification=1.0, decay=self.config.step_decay,
                frozen_head=True)

  def unroll(self, teacher, batch: structs.Batch, key=None) -> tuple[structs.DraftStep, ...]:
    """Drafting as it will be, on true tokens; as `eagle3.Eagle3.unroll`."""
    del key
    features_btd = jax.lax.stop_gradient(teacher.causal(batch.tokens_bt).features['final_btd'])
    positions_bt, mask_bts = feature_config.causal(batch.tokens_bt)
    mask_bt = feature_config.pair_mask(batch)
    carried_btd = features_btd.astype(self.config.dtype)
    keys, values, steps = (), (), []
    step = jax.checkpoint(self._unrolled) if self.config.remat != 'none' else self._unrolled
    for k in range(self.config.unrolled_steps):
      tokens_bt = feature_config.shift_left(batch.tokens_bt, k + 1)
      embedded_btd = jax.lax.stop_gradient(teacher.embed(tokens_bt, positions_bt + k + 1))
      read_btd, carried_btd, keys, values = step(
          embedded_btd, carried_btd, positions_bt + k, mask_bts, keys, values)
      steps.append(structs.DraftStep(
          read_btd=read_btd, predicted_btd=carried_btd,
          taught_btd=feature_config.shift_left(features_btd, k + 1),
          mask_bt=feature_config.shift_left(mask_bt, k)))
    return tuple(steps)

  def _unrolled(self, embedded_btd, carried_btd, positions_bt, mask_bts, keys, values):
    """A step, with the keys and values `[b, t, k, h]` of the steps before it and its own."""
    x_btd = self._fused(embedded_btd, carried_btd)
    query, key, value = self.attention.heads(self.attention_norm(x_btd), positions_bt,
                                             self.config.frequencies())
    keys, values = (*keys, key), (*values, value)
    out = eagle3.attend_unrolled(query, keys, values, mask_bts, scale=self.attention.scale)
    return *self._finished(x_btd, self.attention.combine(out)), keys, values

  def init_cache(self, batch: int, num_slots: int) -> cache_lib.KVCache:
    c = self.config
    return cache_lib.init_cache(1, batch, num_slots, c.num_kv_heads, c.head_dim,
                                jnp.dtype(c.dtype))


def init(config: MTPConfig, key: jax.Array) -> MTP:
  """A freshly initialised draft; trace it under `sharding.sharded_init` to lay it out."""
  generator = jax.random.key(jax.random.bits(key, dtype=jnp.uint32), impl='rbg')
  return MTP(config, rngs=nnx.Rngs(params=generator))
